"""The errors of the extractor's ln_folded forms in half precision at large N, beside the direct form's own.

python -m bench deep-forms --tokens 8192 16384
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hia.config import HiAConfig
from hia.layers.extractor import Extractor
from hia.layers.features import ImageFeatures
from hia_kernels.testing import rel_rms

from ..records import environment, markdown
from ..records.devices import torch_dtype

EXACT = {"fp32": torch.float32, "fp64": torch.float64}
FEATURES = {
    "rectified": lambda x: torch.relu(x),
    "far-from-zero": lambda x: torch.relu(x + 10),
    "heavy-tailed": lambda x: torch.exp(1.5 * x),
}


class Host(NamedTuple):
    """A host, as far as a config needs to know it."""

    hidden_size: int
    num_hidden_layers: int = 40
    model_type: str = "llama"


@dataclass(frozen=True)
class Sizes:
    """Sizes and dtypes of what is compared.

    Attributes:
        channels: C of the features, a multiple of 32.
        dim: D of the adapter.
        queries: M.
        heads: H.
        features: what they are drawn from, of :data:`FEATURES`.
        dtype: of what is judged.
        exact: of the direct form that it is judged by.
        device: "cpu" or "cuda".
        seed: of weights and features.
    """

    channels: int = 2048
    dim: int = 5120
    queries: int = 256
    heads: int = 8
    features: str = "rectified"
    dtype: str = "bf16"
    exact: str = "fp32"
    device: str = "cpu"
    seed: int = 0


def extractor_of(sizes: Sizes) -> Extractor:
    """Draw weights that keep every activation near one; queries spread enough that attention is not uniform."""
    config = HiAConfig.paper(
        Host(sizes.dim),
        dim=sizes.dim,
        num_heads=sizes.heads,
        num_queries=sizes.queries,
        encoder_width=sizes.channels // 32,
    )
    torch.manual_seed(sizes.seed)
    extractor = Extractor(config)
    with torch.no_grad():
        extractor.queries.normal_()
        for linear in (extractor.q_proj, extractor.kv_proj):
            linear.weight.normal_(std=2 * sizes.dim**-0.5)
        for norm in (extractor.query_norm, extractor.feature_norm):
            norm.weight.normal_(1, 0.25)
            norm.bias.normal_(0, 0.25)
    return extractor


@torch.no_grad()
def extract(extractor: Extractor, form: str, hidden: Tensor, features: Tensor) -> Tensor:
    """Extract [M, D] of one image."""
    extractor.form = form
    first = torch.zeros(1, dtype=torch.int64, device=hidden.device)
    return extractor(hidden, first, ImageFeatures((features[None],)).packed(), first)


def measured(sizes: Sizes, tokens: int, forms: Sequence[str]) -> dict[str, float]:
    """Return the error's root mean square over that of the exact result, by form, the direct one's first."""
    dtype, exact_dtype = torch_dtype(sizes.dtype), EXACT[sizes.exact]
    extractor = extractor_of(sizes).to(sizes.device, dtype)
    hidden = torch.randn(1, sizes.dim).to(sizes.device, dtype)
    features = FEATURES[sizes.features](torch.randn(tokens, sizes.channels)).to(sizes.device, dtype)
    found = {"direct": extract(extractor, "direct", hidden, features)}
    extractor.fold_weights()
    found |= {form: extract(extractor, form, hidden, features) for form in forms}
    extractor.unfold_weights()
    extractor.to(exact_dtype)  # the rounded weights, exactly
    exact = extract(extractor, "direct", hidden.to(exact_dtype), features.to(exact_dtype))
    return {form: rel_rms(out, exact) for form, out in found.items()}


def run(sizes: Sizes, tokens: Sequence[int], forms: Sequence[str]) -> int:
    """Print a Markdown table.

    Returns:
        0.
    """
    facts = environment.describe(sizes.device)
    print(
        f"{environment.line_of(facts)}; {sizes.queries} queries, {sizes.heads} heads, {sizes.features} features, "
        f"{sizes.dtype} against {sizes.exact}\n"
    )
    print("\n".join(markdown.table(("form", "N", "C", "D", "error", "direct's"), [])))
    for count in tokens:
        errors = measured(sizes, count, forms)
        for form in forms:
            numbers = (count, sizes.channels, sizes.dim, f"{errors[form]:.2e}", f"{errors['direct']:.2e}")
            print(markdown.row((form, *numbers)), flush=True)
    return 0
