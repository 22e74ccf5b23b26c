"""The small CPU set that guards against regressions: ``bench/test_regression.py`` and ``make bench-compare`` time it.

This file also runs by itself, as a worker of ``bench.compare``, against whichever revision is on the path: it imports
torch, the public functions of that revision's ``hia_kernels`` and, for what is composed of them, its ``hia``; nothing
else of ours.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]

# the small host's adapter: width 768, 256 queries, two 448-pixel images of 196 features and 576 visual tokens each
DIM, HEADS, QUERIES, CHANNELS, FEATURES, VISUAL = 768, 6, 256, 2048, 196, 576
IMAGES = 2
ABSORBED_HEADS = 4  # as the released maths has them there
WIDE = 5120  # LLaMA-13B's hidden size


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape) * scale


def _packing(query_len: int, key_len: int) -> dict[str, Any]:
    steps = torch.arange(IMAGES + 1, dtype=torch.int32)
    return {
        "cu_seqlens_q": steps * query_len, "cu_seqlens_k": steps * key_len,
        "max_seqlen_q": query_len, "max_seqlen_k": key_len,
    }  # fmt: skip


def stem() -> dict[str, Any]:
    """Two grey 224-pixel images through the 7 x 7 stem."""
    return {
        "pixels": torch.randint(0, 256, (IMAGES, 224, 224, 1), dtype=torch.uint8),
        "window": torch.tensor([[0.0, 255.0]] * IMAGES),
        "mean": torch.tensor([0.485, 0.456, 0.406]), "std": torch.tensor([0.229, 0.224, 0.225]),
        "weight": _normal(64, 3, 7, 7, scale=0.08), "scale": torch.ones(64), "shift": torch.zeros(64),
    }  # fmt: skip


def conv_norm_act() -> dict[str, Any]:
    """A 3 x 3 convolution of the third stage."""
    return {
        "x": _normal(IMAGES, 28, 28, 256), "weight": _normal(256, 256, 3, 3, scale=0.02),
        "scale": torch.ones(256), "shift": torch.zeros(256),
    }  # fmt: skip


def condition_queries() -> dict[str, Any]:
    """The instruction's row of one prompt added to the queries."""
    return {
        "hidden": _normal(IMAGES * VISUAL + 60, DIM), "row_idx": torch.tensor([IMAGES * VISUAL + 59]),
        "weight": _normal(DIM, DIM, scale=0.03), "bias": _normal(DIM), "queries": _normal(QUERIES, DIM),
    }  # fmt: skip


def cross_attention() -> dict[str, Any]:
    """The queries ask the features."""
    shapes = {"q": IMAGES * QUERIES, "k": IMAGES * FEATURES, "v": IMAGES * FEATURES}
    tensors = {name: _normal(rows, HEADS, DIM // HEADS) for name, rows in shapes.items()}
    return tensors | _packing(QUERIES, FEATURES)


def norm_linear() -> dict[str, Any]:
    """Norm and projection of the features."""
    return {
        "x": _normal(IMAGES * FEATURES, CHANNELS), "norm_weight": torch.ones(CHANNELS),
        "norm_bias": torch.zeros(CHANNELS), "weight": _normal(DIM, CHANNELS, scale=0.02), "bias": _normal(DIM),
    }  # fmt: skip


def inject_rows() -> dict[str, Any]:
    """The update of the visual tokens."""
    return {
        "hidden": _normal(IMAGES * VISUAL + 60, DIM), "update": _normal(IMAGES * VISUAL, DIM),
        "weight": _normal(DIM, DIM, scale=0.03), "bias": _normal(DIM), "row_idx": torch.arange(IMAGES * VISUAL),
    }  # fmt: skip


def linear() -> dict[str, Any]:
    """Projection of the features."""
    return {"x": _normal(IMAGES * FEATURES, CHANNELS), "weight": _normal(DIM, CHANNELS, scale=0.02),
            "bias": _normal(DIM)}  # fmt: skip


def head_linear() -> dict[str, Any]:
    """Absorbed queries."""
    width = DIM // ABSORBED_HEADS
    return {"x": _normal(IMAGES, ABSORBED_HEADS, QUERIES, width), "weight": _normal(ABSORBED_HEADS, DIM, width)}


def row_softmax() -> dict[str, Any]:
    """The queries' scores over one image's features, four wide heads."""
    return {"scores": _normal(ABSORBED_HEADS * QUERIES, FEATURES, scale=4.0), "scale": 0.25}


def latent_attention() -> dict[str, Any]:
    """Absorbed queries against the features."""
    return {
        "q": _normal(IMAGES, ABSORBED_HEADS * QUERIES, DIM, scale=0.5), "latent": _normal(IMAGES * FEATURES, DIM),
        "lengths": [FEATURES] * IMAGES, "softmax_scale": (DIM // ABSORBED_HEADS) ** -0.5,
    }  # fmt: skip


def _adapter(preset: str, hidden_size: int, layers: int) -> Any:
    """This revision's adapter with one layer, its weights prepared.

    Raises:
        RuntimeError: the path has another checkout's.
    """
    import hia
    import hia_kernels
    from hia.adapter import HiAAdapter

    tree = Path(hia_kernels.__file__).resolve().parents[1]
    if tree not in Path(hia.__file__).resolve().parents:
        raise RuntimeError(f"bench.regression: hia must come from {tree}, got {hia.__file__}")
    host = SimpleNamespace(hidden_size=hidden_size, num_hidden_layers=layers, model_type="llama")
    adapter = HiAAdapter(getattr(hia.HiAConfig, preset)(host, layers="half", num_queries=QUERIES)).eval()
    with torch.no_grad():
        for layer in adapter.layers.values():  # a new adapter injects nothing
            for parameter in layer.injection.parameters():
                parameter.normal_(std=0.02)
    adapter.prepare()
    return adapter


@torch.no_grad()
def encode() -> Call:
    """One grey 224-pixel image through the small host's encoder."""
    encoder = _adapter("paper", DIM, 6).encoder
    pixels, window = torch.randint(0, 256, (224, 224, 1), dtype=torch.uint8), torch.tensor([0.0, 255.0])
    return torch.no_grad()(lambda: encoder(pixels, window))


@torch.no_grad()
def second_question() -> Call:
    """A later question about one 448-pixel image: the narrow adapter's layer on the 13B host's width."""
    adapter = _adapter("lite", WIDE, 40)
    from hia.features import ImageFeatures
    from hia.layout import build_layout

    side = round(FEATURES**0.5)
    maps = (_normal(side, side, CHANNELS).relu_(),)
    sides = adapter.sides(ImageFeatures(maps).packed(), "auto")
    tokens = VISUAL + 60
    image_map = torch.full((1, tokens), -1)
    image_map[0, 1 : 1 + VISUAL] = 0
    layout = build_layout(image_map, torch.tensor([tokens - 1]), 1).for_call(1, tokens, torch.device("cpu"))
    (layer,) = adapter.layers.values()
    hidden = _normal(1, tokens, WIDE)
    # a copy, since without gradients the layer writes in place; the packing is made anew, as by every question
    return torch.no_grad()(lambda: layer(hidden.clone(), ImageFeatures(maps, (sides,)).packed(), layout))


INPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "stem": stem,
    "conv_norm_act": conv_norm_act,
    "condition_queries": condition_queries,
    "cross_attention": cross_attention,
    "norm_linear": norm_linear,
    "inject_rows": inject_rows,
    "linear": linear,
    "head_linear": head_linear,
    "row_softmax": row_softmax,
    "latent_attention": latent_attention,
}
COMPOSITES: dict[str, Callable[[], Call]] = {"encode": encode, "second_question": second_question}
TRAINED = {"cross_attention": ("q", "k", "v"), "norm_linear": ("x", "weight"), "inject_rows": ("update", "weight")}
CASES = (*INPUTS, *(f"{op}:both" for op in TRAINED), *COMPOSITES)


def make_call(case: str) -> Call:
    """What is timed: one call of the op or composite, or, behind ":both", one with its backward. Inputs are made here.

    Raises:
        ValueError: no such case. AttributeError, ImportError: this revision has no such op.
    """
    import hia_kernels

    if case not in CASES:
        raise ValueError(f"bench.regression: case must be among {', '.join(CASES)}, got {case!r}")
    op, _, both = case.partition(":")
    torch.manual_seed(0)
    if op in COMPOSITES:
        return COMPOSITES[op]()
    function = getattr(hia_kernels, op)
    inputs = INPUTS[op]()
    if not both:
        return lambda: _forward(function, inputs)
    leaves = [inputs[name].requires_grad_() for name in TRAINED[op]]
    with torch.no_grad():
        dout = torch.randn_like(function(**inputs))
    return lambda: torch.autograd.grad(function(**inputs), leaves, dout)


@torch.no_grad()
def _forward(function: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    return function(**inputs)


def time_call(call: Call, times: int) -> float:
    """Milliseconds a call, the mean of ``times``."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) * 1e3 / times


def serve() -> None:
    """Read "CASE TIMES" lines, write milliseconds, or "error: ..." for what this revision can't run."""
    import hia_kernels

    print(f"ready {hia_kernels.__file__}", flush=True)
    calls: dict[str, Call] = {}
    for line in sys.stdin:
        case, times = line.split()
        try:
            if case not in calls:
                calls[case] = make_call(case)
                calls[case]()
            answer = repr(time_call(calls[case], int(times)))
        except Exception as error:  # the other revision may still run it
            answer = f"error: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        print(answer, flush=True)


if __name__ == "__main__":
    serve()
