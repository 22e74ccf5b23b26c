"""How exact the extractor's ln_folded forms are in half precision at large N, beside the direct form's own error.

python -m bench deep-forms --tokens 8192 16384
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from hia.config import HiAConfig
from hia.layers.extractor import Extractor
from hia.layers.features import ImageFeatures
from hia_kernels.testing import rel_rms

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EXACT = {"fp32": torch.float32, "fp64": torch.float64}
FEATURES = {
    "rectified": lambda x: torch.relu(x),
    "far-from-zero": lambda x: torch.relu(x + 10),
    "heavy-tailed": lambda x: torch.exp(1.5 * x),
}


class Host(NamedTuple):
    """What a config needs to know of a host."""

    hidden_size: int
    num_hidden_layers: int = 40
    model_type: str = "llama"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser("python -m bench deep-forms", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384], help="N, feature tokens of the image")
    parser.add_argument("--channels", type=int, default=2048, help="C of the features, a multiple of 32")
    parser.add_argument("--dim", type=int, default=5120, help="D of the adapter")
    parser.add_argument("--queries", type=int, default=256, help="M")
    parser.add_argument("--heads", type=int, default=8, help="H")
    parser.add_argument(
        "--forms", nargs="+", default=["ln_folded_kv", "ln_folded_absorbed"], help="compared with direct"
    )
    parser.add_argument("--features", choices=FEATURES, default="rectified", help="what they are drawn from")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of what is judged")
    parser.add_argument("--exact", choices=EXACT, default="fp32", help="of the direct form that they are judged by")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of weights and features")
    args = parser.parse_args(argv)
    if args.channels % 32:
        parser.error(f"--channels must be a multiple of 32, got {args.channels}")
    return args


def extractor_of(args: argparse.Namespace) -> Extractor:
    """Random weights that keep every activation near one; queries spread enough that attention is not uniform."""
    config = HiAConfig.paper(
        Host(args.dim), dim=args.dim, num_heads=args.heads, num_queries=args.queries, encoder_width=args.channels // 32
    )
    torch.manual_seed(args.seed)
    extractor = Extractor(config)
    with torch.no_grad():
        extractor.queries.normal_()
        for linear in (extractor.q_proj, extractor.kv_proj):
            linear.weight.normal_(std=2 * args.dim**-0.5)
        for norm in (extractor.query_norm, extractor.feature_norm):
            norm.weight.normal_(1, 0.25)
            norm.bias.normal_(0, 0.25)
    return extractor


@torch.no_grad()
def extract(extractor: Extractor, form: str, hidden: Tensor, features: Tensor) -> Tensor:
    """[M, D] of one image."""
    extractor.form = form
    first = torch.zeros(1, dtype=torch.int64, device=hidden.device)
    return extractor(hidden, first, ImageFeatures((features[None],)).packed(), first)


def measured(args: argparse.Namespace, tokens: int) -> dict[str, float]:
    """Root mean square of the error over that of the exact result, by form, the direct one's first."""
    dtype, exact_dtype = DTYPES[args.dtype], EXACT[args.exact]
    extractor = extractor_of(args).to(args.device, dtype)
    hidden = torch.randn(1, args.dim).to(args.device, dtype)
    features = FEATURES[args.features](torch.randn(tokens, args.channels)).to(args.device, dtype)
    found = {"direct": extract(extractor, "direct", hidden, features)}
    extractor.fold_weights()
    found |= {form: extract(extractor, form, hidden, features) for form in args.forms}
    extractor.unfold_weights()
    extractor.to(exact_dtype)  # the rounded weights, exactly
    exact = extract(extractor, "direct", hidden.to(exact_dtype), features.to(exact_dtype))
    return {form: rel_rms(out, exact) for form, out in found.items()}


def device_name(device: str) -> str:
    """For the table's heading."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main(argv: list[str] | None = None) -> None:
    """Write one Markdown table to standard output."""
    args = parse(argv)
    command = shlex.join(["python", "-m", "bench.ops.deep_forms", *(sys.argv[1:] if argv is None else argv)])
    sys.stdout.write(
        f"`{command}` on {device_name(args.device)}, torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"{args.queries} queries, {args.heads} heads, {args.features} features, {args.dtype} against {args.exact}\n\n"
        f"| form | N | C | D | error | direct's |\n|---|---|---|---|---|---|\n"
    )
    for tokens in args.tokens:
        errors = measured(args, tokens)
        for form in args.forms:
            row = (form, tokens, args.channels, args.dim, f"{errors[form]:.2e}", f"{errors['direct']:.2e}")
            sys.stdout.write(f"| {' | '.join(map(str, row))} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
