"""Calls of the small CPU set: of ops with inputs that are given, and of composites of the adapter.

This file also runs by itself, as a worker of ``bench compare``, against whichever revision is on the path: it imports
torch, the public functions of that revision's ``hia_kernels`` and, for what is composed of them, its ``hia``, where its
modules lie now or lay before; nothing else of ours. Inputs come in a file, so that every revision has the same.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

Call = Callable[[], Any]

# the small host's adapter: width 768, 256 queries; of 448 pixels 196 features and 576 visual tokens
DIM, QUERIES, CHANNELS, FEATURES, VISUAL = 768, 256, 2048, 196, 576
WIDE = 5120  # LLaMA-13B's hidden size


def _part(name: str) -> ModuleType:
    """Import a module of the adapter: of ``hia.layers``, in older revisions of ``hia`` itself.

    Which one is seen by the folder: where the package is installed from a checkout, importing would find the other
    revision's.
    """
    import hia

    is_new = (Path(hia.__file__).parent / "layers").is_dir()
    return importlib.import_module(f"hia.layers.{name}" if is_new else f"hia.{name}")


def _adapter(preset: str, hidden_size: int, layers: int) -> Any:
    """Make this revision's adapter with one layer, its weights folded.

    Raises:
        RuntimeError: the path has another checkout's.
    """
    import hia
    import hia_kernels

    tree = Path(hia_kernels.__file__).resolve().parents[1]
    if tree not in Path(hia.__file__).resolve().parents:
        raise RuntimeError(f"bench compare: hia must come from {tree}, got {hia.__file__}")
    host = SimpleNamespace(hidden_size=hidden_size, num_hidden_layers=layers, model_type="llama")
    config = getattr(hia.HiAConfig, preset)(host, layers="half", num_queries=QUERIES)
    adapter = _part("adapter").HiAAdapter(config).eval()
    with torch.no_grad():
        for layer in adapter.layers.values():  # a new adapter injects nothing
            for parameter in layer.injection.parameters():
                parameter.normal_(std=0.02)
    (adapter.fold_weights if hasattr(adapter, "fold_weights") else adapter.prepare)()  # older revisions' name
    return adapter


@torch.no_grad()
def encode() -> Call:
    """Encode one grey 224-pixel image by the small host's encoder."""
    encoder = _adapter("paper", DIM, 6).encoder
    pixels, window = torch.randint(0, 256, (224, 224, 1), dtype=torch.uint8), torch.tensor([0.0, 255.0])
    return torch.no_grad()(lambda: encoder(pixels, window))


@torch.no_grad()
def second_question() -> Call:
    """Ask a later question about one 448-pixel image: the narrow adapter's layer on the 13B host's width."""
    adapter = _adapter("lite", WIDE, 40)
    ImageFeatures, build_layout = _part("features").ImageFeatures, _part("layout").build_layout
    side = round(FEATURES**0.5)
    maps = (torch.randn(side, side, CHANNELS).relu_(),)
    keep = adapter.layer_caches if hasattr(adapter, "layer_caches") else adapter.sides  # older revisions' name
    kept = keep(ImageFeatures(maps).packed(), "auto")
    tokens = VISUAL + 60
    image_map = torch.full((1, tokens), -1)
    image_map[0, 1 : 1 + VISUAL] = 0
    layout = build_layout(image_map, torch.tensor([tokens - 1]), 1).for_call(1, tokens, torch.device("cpu"))
    (layer,) = adapter.layers.values()
    hidden = torch.randn(1, tokens, WIDE)
    # a copy, since without gradients the layer writes in place; the packing is made anew, as by every question
    return torch.no_grad()(lambda: layer(hidden.clone(), ImageFeatures(maps, (kept,)).packed(), layout))


COMPOSITES: dict[str, Callable[[], Call]] = {"encode": encode, "second_question": second_question}


def op_call(function: Callable[..., Any], inputs: dict[str, Any], trained: Sequence[str] = ()) -> Call:
    """Make one call of an op; with ``trained``, names of arguments, one with the backward into those."""
    if not trained:
        return lambda: _forward(function, inputs)
    leaves = {name: inputs[name].detach().requires_grad_() for name in trained}
    ready = {**inputs, **leaves}
    torch.manual_seed(0)
    with torch.no_grad():
        dout = torch.randn_like(function(**ready))
    return lambda: torch.autograd.grad(function(**ready), list(leaves.values()), dout)


def composite_call(name: str) -> Call:
    """Make one call of a composite of this revision's."""
    torch.manual_seed(0)
    return COMPOSITES[name]()


def make_call(case: str, given: dict[str, dict[str, Any]]) -> Call:
    """Make the call that is timed, of this revision.

    Args:
        case: a composite or one of ``given``; the op's name, behind which ":both" asks for the backward.
        given: for each case of an op its "inputs" and "trained".

    Raises:
        AttributeError, ImportError: this revision has no such op.
    """
    import hia_kernels

    if case in COMPOSITES:
        return composite_call(case)
    return op_call(getattr(hia_kernels, case.partition(":")[0]), **given[case])


@torch.no_grad()
def _forward(function: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    return function(**inputs)


def time_call(call: Call, times: int) -> float:
    """Return milliseconds a call, the mean of ``times``."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) * 1e3 / times


def serve(path: str) -> None:
    """Read "CASE TIMES" lines, write milliseconds, or "error: ..." for what this revision can't run.

    Args:
        path: of the ops' inputs.
    """
    import hia_kernels

    given = torch.load(path, weights_only=True)
    print(f"ready {hia_kernels.__file__}", flush=True)
    calls: dict[str, Call] = {}
    for line in sys.stdin:
        case, times = line.split()
        try:
            if case not in calls:
                calls[case] = make_call(case, given)
                calls[case]()
            answer = repr(time_call(calls[case], int(times)))
        except Exception as error:  # the other revision may still run it
            answer = f"error: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        print(answer, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
