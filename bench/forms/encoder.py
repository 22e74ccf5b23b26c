"""Ways to run the folded encoder on the CPU, beside each other: ``python -m bench encoder-forms``.

What folding and packing, strips and a memory budget each cost or give, in time and in activations; fp32, ResNet-50
with random weights, on real radiographs where the data folder has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hia import HiAConfig
from hia.encoder import memory, workspace
from hia.encoder.encoder import Encoder, build_encoder
from hia_kernels import use_backend

from ..cli import BadOption
from ..measure.memory import memory_of
from ..measure.timing import Budget, cpu_clock, interleaved
from ..records import environment, markdown
from ..workloads.images import ImageSource, find_images

WINDOW = torch.tensor([0.0, 255.0])
FORMS = {
    "parameters": "not folded: each convolution scales its weight first",
    "whole": "folded, every map as a whole",
    "fresh": "the same without the memory that is kept between images",
    "onednn": "the same by oneDNN alone, HIA_BACKEND=cpu",
    "strips": "folded, as it is by default: in strips up to the first halving where maps are large",
    "budget": "folded, in strips through the whole network, within --budget-mib",
}


def encoder_of(width: int) -> Encoder:
    """Build an encoder in evaluation, with norms that let a signal through all blocks."""
    torch.manual_seed(0)
    config = HiAConfig(hidden_size=64, num_hidden_layers=3, dim=64, num_heads=1, encoder_width=width)
    encoder = build_encoder(config).eval()
    encoder.set_auto_fold(False)
    with torch.no_grad():
        for name, tensor in encoder.named_parameters():
            if name.endswith("bn3.weight"):
                tensor.fill_(0.2)
    return encoder


@contextmanager
def whole_maps() -> Iterator[None]:
    """Cut no map into strips, unless a budget asks for it."""
    before = memory.LARGE_MAP
    memory.LARGE_MAP = 2**62
    try:
        yield
    finally:
        memory.LARGE_MAP = before


def calls_of(forms: Sequence[str], width: int, pixels: Tensor, budget: int) -> dict[str, Callable[[], Tensor]]:
    """Return each form as a call that encodes ``pixels``."""
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
def rows_of(
    side: int, forms: Sequence[str], *, width: int, budget: int, seconds: float, source: ImageSource
) -> tuple[list[tuple[str, ...]], bool]:
    """Measure one side's forms, in turns.

    Returns:
        Rows of the table, and whether all forms have the same features.
    """
    calls = calls_of(forms, width, source.load(1, side)[0], budget)
    first = next(iter(calls))
    truth = calls[first]().double()
    peaks, differences = {}, {}
    for name, call in calls.items():
        call()  # packs weights for its sizes
        memory = memory_of(call, "cpu")
        peaks[name] = memory.peak
        differences[name] = ((memory.result - truth).norm() / truth.norm()).item()
    found = interleaved(calls, cpu_clock, Budget(seconds))
    base = found["whole"].percentile(50) if "whole" in found else None
    rows = []
    for name, samples in found.items():
        ratio = "-" if base is None else f"{samples.percentile(50) / base:.2f}"
        time = f"{samples.percentile(50):,.0f}{' (noisy)' if samples.noisy else ''}"
        differs = "-" if name == first else f"{differences[name]:.1e}"
        rows.append((str(side), name, time, ratio, f"{peaks[name] / 1e6:,.1f}", differs))
    return rows, all(difference < 1e-5 for difference in differences.values())


def check_budget(sides: Sequence[int], width: int, budget_mib: int) -> None:
    """Check that the sides' strips fit into the budget.

    Raises:
        BadOption: they don't.
    """
    for side in sides:
        try:
            with torch.device("meta"):
                memory.strip_rows(encoder_of(width), side, side, budget_mib * 2**20)
        except ValueError as error:
            raise BadOption(f"--budget-mib: {error}") from error


def run(sides: Sequence[int], forms: Sequence[str], *, width: int, budget_mib: int, seconds: float) -> int:
    """Measure and print a Markdown table.

    Returns:
        0; 1 if a form's features differ.
    """
    check_budget(sides, width, budget_mib)
    source, same = find_images(None), True
    header = ("px", "form", "ms", "against whole", "peak MB", "differs from first")
    print("\n".join(markdown.table(header, [], text=("form",))))
    for side in sides:
        rows, agree = rows_of(side, forms, width=width, budget=budget_mib * 2**20, seconds=seconds, source=source)
        same &= agree
        print("\n".join(map(markdown.row, rows)), flush=True)
    print(f"\n{environment.line_of(environment.describe('cpu'))}; {source.note}")
    return 0 if same else 1
