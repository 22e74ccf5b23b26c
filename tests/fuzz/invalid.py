"""Wrong calls: a valid one with one argument changed. Each must raise, and the message must name an argument."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.case import INDICES, INF, NAN, Case
from tests.inputs import Inputs

INTEGERS = ("max_seqlen_q", "max_seqlen_k", "stride", "pool")
NUMBERS = ("softmax_scale", "scale", "eps")
FLAGS = ("merge_heads", "pad_rows")
# what the argument must not be, whatever the op makes of the rest
WRONG_VALUES: dict[str, dict[str, Any]] = {
    "stride": {"value-3": 3, "value-0": 0},
    "pool": {"value-2": 2, "value-0": 0},
    "activation": {"value-tanh": "tanh", "python-none": None},
    "max_seqlen_q": {"value-negative": -1},
    "max_seqlen_k": {"value-negative": -1},
    "eps": {"value-negative": -1.0, "value-nan": NAN},
    "out_dtype": {"value-int32": torch.int32, "python-str": "float16"},
    "lengths": {"python-none": None, "python-tensor": torch.tensor([1])},
}


def _tied(case: Case) -> list[tuple[str, int]]:
    """List the dims whose size another dim, or the contract, fixes: argument and position."""
    shapes = case.subject.shapes
    arguments = case.arguments()
    counted = Counter(
        symbol for name, spec in shapes.items() if arguments[name] is not None for symbol in spec.split(" ")
    )
    return [
        (name, position)
        for name, spec in shapes.items()
        if arguments[name] is not None
        for position, symbol in enumerate(spec.split(" "))
        if symbol.isdecimal() or counted[symbol] > 1
    ]


def _of_tensor(case: Case, name: str, x: Tensor) -> list[str]:
    found = ["rank-more", "rank-less", "dtype-complex64", "dtype-bool", "device-meta", "sparse", "python-list"]
    if len(case.subject.shapes) == 1:
        found.remove("device-meta")  # there is no other device beside it
    if name not in case.subject.optional:
        found.append("python-none")
    if name in INDICES:
        found += ["dtype-float32", "index-negative", "index-beyond"] if x.numel() else ["dtype-float32"]
    elif name != "pixels":
        found.append("dtype-int64")
    if name == "row_idx" and case.subject.op == "inject_rows" and x.numel() > 1:
        found.append("index-repeated")
    if name.startswith("cu_seqlens") and x.numel() > 1:
        found += ["cu-start", "cu-end"]
    if name == "window" and x.numel():
        found += ["window-equal", "window-nan"]
    if name in ("mean", "std"):
        found.append("statistics-inf")
    if name == "std":
        found.append("statistics-zero")
    return found


def mutations(case: Case) -> list[tuple[str, str]]:
    """List the argument and the change of every wrong call that can be made of a valid one."""
    found = [(name, f"size-{position}") for name, position in _tied(case)]
    for name, value in case.arguments().items():
        if isinstance(value, Tensor):
            found += [(name, how) for how in _of_tensor(case, name, value)]
        found += [(name, how) for how in WRONG_VALUES.get(name, {})]
        if name in INTEGERS:
            found += [(name, how) for how in ("python-none", "python-str", "python-bool", "python-float")]
        if name in NUMBERS and not (name == "scale" and isinstance(value, Tensor)):
            found += [(name, "python-str")] + ([] if name == "softmax_scale" else [(name, "python-none")])
        if name == "lengths":
            found += [(name, "lengths-sum")] + ([(name, "lengths-negative")] if len(value) > 1 else [])
        if name.startswith("max_seqlen") and value > 0:
            found.append((name, "value-too-small"))
    if case.subject.op == "row_softmax" and case.subject.written:
        found = [one for one in found if one[0] != "out_dtype"]  # no argument of it
    return found


def _scalar(name: str, how: str, value: Any) -> Any:
    if how in WRONG_VALUES.get(name, {}):
        return WRONG_VALUES[name][how]
    if how == "lengths-sum":
        return [*value, 1] if not value else [value[0] + 1, *value[1:]]
    if how == "lengths-negative":
        return [-1, value[1] + value[0] + 1, *value[2:]]
    if how == "value-too-small":
        return value - 1
    return {"python-none": None, "python-str": "3", "python-bool": True, "python-float": 1.5}[how]


def _resized(x: Tensor, position: int) -> Tensor:
    sizes = list(x.shape)
    sizes[position] += 1
    return torch.zeros(sizes, dtype=x.dtype)


def _tensor(how: str, x: Tensor) -> Any:
    kind, _, what = how.partition("-")
    if kind == "size":
        return _resized(x, int(what))
    if kind == "dtype":
        return x.to(getattr(torch, what))
    if kind == "device":
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    if kind == "python":
        return None if what == "none" else x.tolist()
    if kind == "sparse":
        return torch.sparse_coo_tensor(size=x.shape, dtype=x.dtype, check_invariants=False)
    if kind == "rank":
        return x.unsqueeze(0) if what == "more" else x.flatten()[:1].reshape(()) if x.numel() else x.new_zeros(())
    changed = x.clone(memory_format=torch.contiguous_format)
    flat = changed.view(-1)
    if how == "index-negative":
        flat[0] = -1
    elif how in ("index-beyond", "cu-end"):
        flat[-1] = 10**6
    elif how == "index-repeated":
        flat[-1] = flat[0]
    elif how == "cu-start":
        flat[0] = 1
    elif how.startswith("window"):
        flat[1] = flat[0] if how == "window-equal" else NAN
    else:
        flat[0] = INF if how == "statistics-inf" else 0.0
    return changed


def mutated(case: Case) -> Inputs:
    """Return the arguments, with the one that is wrong."""
    assert case.mutation is not None
    name, how = case.mutation
    arguments = case.arguments()
    value = arguments[name]
    wrong = _tensor(how, value) if isinstance(value, Tensor) else _scalar(name, how, value)
    return {**arguments, name: wrong}


def problem_of(error: BaseException | None, names: tuple[str, ...]) -> str | None:
    """Say what is wrong with how a wrong call ended; None if nothing is."""
    if error is None:
        return "it returned"
    if not isinstance(error, (TypeError, ValueError, RuntimeError)):
        return f"it raised {type(error).__name__}: {error}"
    message = str(error)
    if not message.startswith("hia::"):
        return f"its message must begin with hia::, got {type(error).__name__}: {message[:200]}"
    if not any(name in message for name in names):
        return f"its message must name an argument, got {message[:200]}"
    return None
