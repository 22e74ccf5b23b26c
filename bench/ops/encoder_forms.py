"""Ways to run the folded encoder on the CPU, beside each other: ``python -m bench encoder-forms``.

What folding and packing, strips and a memory budget each cost or give, in time and in activations; fp32, ResNet-50
with random weights, on real radiographs where the data folder has them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hia import HiAConfig
from hia.encoder import strips, workspace
from hia.encoder.encoder import Encoder, build_encoder
from hia_kernels import use_backend

from ..measure.memory import memory_of
from ..measure.timing import Budget, cpu_clock, interleaved
from ..records import environment
from ..workloads.images import find_images

LEAST, MOST = 64, 8192
WINDOW = torch.tensor([0.0, 255.0])
FORMS = {
    "parameters": "not folded: each convolution scales its weight first",
    "whole": "folded, every map as a whole",
    "fresh": "the same without the memory that is kept between images",
    "onednn": "the same by oneDNN alone, HIA_BACKEND=cpu",
    "strips": "folded, as it is by default: in strips up to the first halving where maps are large",
    "budget": "folded, in strips through the whole network, within --budget-mib",
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Checked flags.

    Raises:
        SystemExit: a value that isn't allowed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench encoder-forms",
        description="The encoder on the CPU in several forms, timed in turns. "
        + "; ".join(f"{name}: {what}" for name, what in FORMS.items()),
    )
    parser.add_argument("--px", type=int, nargs="+", default=[896, 2048], help="sides of the image (default: 896 2048)")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS), help="default: all")
    parser.add_argument("--budget-mib", type=int, default=128, metavar="M", help="of activations (default: 128)")
    parser.add_argument("--width", type=int, default=64, help="of the encoder (default: 64, ResNet-50's)")
    parser.add_argument("--seconds", type=float, default=30, metavar="S", help="for each side (default: 30)")
    options = parser.parse_args(arguments)
    for flag in ("budget_mib", "width", "seconds"):
        if not getattr(options, flag) > 0:
            parser.error(f"--{flag.replace('_', '-')}: must be positive, got {getattr(options, flag)}")
    for side in options.px:
        if not LEAST <= side <= MOST:
            parser.error(f"--px: must be from {LEAST} to {MOST}, got {side}")
        try:
            with torch.device("meta"):
                strips.strip_rows(encoder_of(options.width), side, side, options.budget_mib * 2**20)
        except ValueError as error:
            parser.error(f"--budget-mib: {error}")
    return options


def encoder_of(width: int) -> Encoder:
    """In evaluation, with norms that let a signal through all blocks."""
    torch.manual_seed(0)
    config = HiAConfig(hidden_size=64, num_hidden_layers=3, dim=64, num_heads=1, encoder_width=width)
    encoder = build_encoder(config).eval()
    with torch.no_grad():
        for name, tensor in encoder.named_parameters():
            if name.endswith("bn3.weight"):
                tensor.fill_(0.2)
    return encoder


@contextmanager
def whole_maps() -> Iterator[None]:
    """No strips but within a budget."""
    before = strips.LARGE_MAP
    strips.LARGE_MAP = 2**62
    try:
        yield
    finally:
        strips.LARGE_MAP = before


def calls_of(forms: Sequence[str], width: int, pixels: Tensor, budget: int) -> dict[str, Callable[[], Tensor]]:
    """Each form as a call that encodes ``pixels``."""
    plain, folded = encoder_of(width), encoder_of(width)
    by_onednn = encoder_of(width) if "onednn" in forms else folded
    for encoder in {folded, by_onednn}:
        encoder.fold_weights()

    def whole(encoder: Encoder = folded) -> Tensor:
        with whole_maps():
            return encoder(pixels, WINDOW)

    def fresh() -> Tensor:
        largest, workspace.LARGEST = workspace.LARGEST, 0
        try:
            return whole()
        finally:
            workspace.LARGEST = largest

    def onednn() -> Tensor:
        with use_backend("cpu"):
            return whole(by_onednn)

    calls: dict[str, Callable[[], Tensor]] = {
        "parameters": lambda: plain(pixels, WINDOW),
        "whole": whole,
        "fresh": fresh,
        "onednn": onednn,
        "strips": lambda: folded(pixels, WINDOW),
        "budget": lambda: folded(pixels, WINDOW, budget),
    }
    return {form: calls[form] for form in forms}


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a Markdown table.

    Returns:
        0; 1 if a form's features differ.
    """
    options = parse(arguments)
    source, failed = find_images(None), False
    print(
        "| px | form | ms | against whole | peak MB | differs from first |\n| ---: | --- | ---: | ---: | ---: | ---: |"
    )
    for side in options.px:
        calls = calls_of(options.form, options.width, source.load(1, side)[0], options.budget_mib * 2**20)
        first = next(iter(calls))
        truth = calls[first]().double()
        peaks, differences = {}, {}
        for name, call in calls.items():
            call()  # packs weights for its sizes
            memory = memory_of(call, "cpu")
            peaks[name] = memory.peak
            differences[name] = ((memory.result - truth).norm() / truth.norm()).item()
        failed |= any(not difference < 1e-5 for difference in differences.values())
        differ = {name: "-" if name == first else f"{value:.1e}" for name, value in differences.items()}
        found = interleaved(calls, cpu_clock, Budget(options.seconds))
        base = found["whole"].percentile(50) if "whole" in found else None
        for name, samples in found.items():
            ratio = "-" if base is None else f"{samples.percentile(50) / base:.2f}"
            noisy = " (noisy)" if samples.noisy else ""
            print(
                f"| {side} | {name} | {samples.percentile(50):,.0f}{noisy} | {ratio} | {peaks[name] / 1e6:,.1f} "
                f"| {differ[name]} |",
                flush=True,
            )
    facts = environment.describe("cpu", "bench.ops.encoder_forms")
    print(
        f"\n`{facts['command']}` at commit {(facts['commit'] or 'unknown')[:12]}"
        f"{' with changes' if facts['dirty'] else ''}, {facts['cpu']}, {facts['threads']} threads, "
        f"torch {facts['versions']['torch']}; {source.note}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
