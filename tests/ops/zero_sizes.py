"""Calls with axes of size 0: by op its axes, the options that lead to other code, and what every backend must do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hia_kernels
from hia_kernels import testing, use_backend
from hia_kernels.core import backend
from hia_kernels.testing import Results
from tests.inputs import Inputs
from tests.ops.harness import forward_backward

# by function: its axes and their sizes, unless they are 0
AXES = {
    "linear": {"rows": 3, "channels": 4, "dim": 5},
    "head_linear": {"images": 2, "heads": 3, "rows": 4, "channels": 5, "dim": 6},
    "norm_linear": {"tokens": 6, "rows": 4, "channels": 5, "dim": 3},
    "condition_queries": {"tokens": 6, "rows": 4, "queries": 3, "channels": 5, "dim": 7},
    "inject_rows": {"tokens": 6, "rows": 4, "channels": 5, "dim": 7},
    "cross_attention": {"sequences": 2, "queries": 7, "keys": 9, "heads": 3},
    "latent_attention": {"images": 2, "rows": 3, "channels": 5, "tokens": 4},
    "row_softmax": {"rows": 3, "columns": 5},
    "conv_norm_act": {"images": 2},
    "stem": {"images": 2},
}
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "linear": ({}, {"bias": False}),
    "head_linear": ({}, {"merge_heads": True}, {"transposed": True}),
    "norm_linear": ({}, {"bias": False}, {"all_rows": True}),
    "condition_queries": ({}, {"bias": False}),
    "inject_rows": ({}, {"bias": False}),
    "cross_attention": ({}, {"first_without": "queries"}, {"first_without": "keys"}, {"head_dim": 272}),
    "latent_attention": ({}, {"first_without": "tokens"}),
    "row_softmax": ({}, {"out_dtype": torch.float16}),
    "conv_norm_act": tuple(
        {"kernel": kernel, "stride": stride, "activation": activation, "residual": residual, "channels": channels}
        for kernel, stride, activation, residual, channels in (
            (1, 1, "none", False, 5),
            (1, 2, "relu", True, 32),
            (3, 1, "gelu", True, 32),
            (3, 1, "relu", False, 5),
            (3, 2, "none", True, 32),
        )
    ),
    "stem": (
        {"pool": 3},
        {"pool": 1, "grey": True},
        {"pool": 3, "kernel": 3, "pixels": torch.uint8},
        {"pool": 3, "outputs": 32},
    ),
}


class Case(NamedTuple):
    """A call: the op, the axes that are empty, the options.

    Attributes:
        op: its name.
        empty: names of axes.
        options: of :data:`OPTIONS`.
    """

    op: str
    empty: tuple[str, ...]
    options: dict[str, Any]

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.op} without {'+'.join(self.empty)}" + (f" ({options})" if options else "")


def cases(*ops: str, at_most: int = 2) -> Iterator[Case]:
    """List calls with every axis empty, and with every ``at_most`` of them."""
    for op in ops or AXES:
        for count in range(1, at_most + 1):
            for empty in combinations(AXES[op], count):
                for options in OPTIONS[op]:
                    if not (options.get("all_rows") and "rows" in empty):  # there is no such axis then
                        yield Case(op, empty, options)


def draw(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Return the arguments of the call, by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    sizes = {name: 0 if name in case.empty else size for name, size in AXES[case.op].items()}
    inputs = _MAKERS[case.op](normal, **sizes, **case.options)
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}


FUNCTIONS = {"cross_attention": ("cross_attention", "cross_attention_with_lse")}  # of the others: the op's name
IN_PLACE = {"inject_rows": "hidden", "row_softmax": "scores"}  # ops with a function that writes to this argument


def compare(case: Case, dtype: torch.dtype, name: str, device: str = "cpu") -> bool:
    """Compare a row's results and gradients with the reference's, where it serves the call.

    Args:
        case: the call.
        dtype: of its tensors.
        name: of the row, or "auto".
        device: of its tensors.

    Returns:
        Whether the row serves it.
    """
    inputs, row = draw(case, dtype, device), backend.TABLES[case.op].row(name)
    for function in FUNCTIONS.get(case.op, (case.op,)):
        if row and (row.unavailable_reasons() or row.unsupported_reasons(function, **inputs)):
            return False
        expected = _results(case.op, function, inputs, "reference")
        _assert_equal(_results(case.op, function, inputs, name), expected)
        if len(case.empty) == 1:
            _assert_alone(function, inputs, name, expected)
    if case.op in IN_PLACE and inputs.get("out_dtype") is None:
        changed = inputs[IN_PLACE[case.op]].clone()
        arguments = {key: x for key, x in inputs.items() if key != "out_dtype"} | {IN_PLACE[case.op]: changed}
        with use_backend(name):
            returned = getattr(hia_kernels, f"{case.op}_")(**arguments)
        _assert_equal({"out": changed, "lse": returned}, {"lse": changed, **expected})
    return True


def _assert_alone(function: str, inputs: Inputs, name: str, expected: Results) -> None:
    """Ask for each gradient without the others."""
    for wanted in (key.removeprefix("d") for key in expected if key.startswith("d")):
        with use_backend(name), suppress(NotImplementedError):
            got = testing.forward_backward(getattr(hia_kernels, function), inputs, (wanted,))
            _assert_equal(got, expected)


def _results(op: str, function: str, inputs: Inputs, name: str) -> Results:
    """Run forward and backward; a row without this backward runs the forward alone."""
    public = getattr(hia_kernels, function)
    with use_backend(name):
        try:
            return forward_backward(op, public, inputs)
        except NotImplementedError:
            return testing.forward_backward(public, inputs)


def _assert_equal(got: Results, expected: Results) -> None:
    for key, x in got.items():
        torch.testing.assert_close(x, expected[key], equal_nan=True, msg=lambda text, key=key: f"{key}: {text}")


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _indices(rows: int, tokens: int) -> Tensor:
    return torch.arange(rows if tokens else 0, dtype=torch.int64)  # no row is in an empty tensor


def _linear(normal, rows, channels, dim, bias=True):
    return {"x": normal(rows, channels), "weight": normal(dim, channels), "bias": normal(dim) if bias else None}


def _head_linear(normal, images, heads, rows, channels, dim, merge_heads=False, transposed=False):
    weight = normal(heads, channels, dim).mT if transposed else normal(heads, dim, channels)
    return {"x": normal(images, heads, rows, channels), "weight": weight, "merge_heads": merge_heads}


def _norm_linear(normal, tokens, rows, channels, dim, bias=True, all_rows=False):
    return {
        "x": normal(tokens, channels),
        "norm_weight": normal(channels),
        "norm_bias": normal(channels),
        "weight": normal(dim, channels),
        "bias": normal(dim) if bias else None,
        "row_idx": None if all_rows else _indices(rows, tokens),
    }


def _condition_queries(normal, tokens, rows, queries, channels, dim, bias=True):
    return {
        "hidden": normal(tokens, channels),
        "row_idx": _indices(rows, tokens),
        "weight": normal(dim, channels),
        "bias": normal(dim) if bias else None,
        "queries": normal(queries, dim),
    }


def _inject_rows(normal, tokens, rows, channels, dim, bias=True):
    row_idx = _indices(rows, tokens)
    return {
        "hidden": normal(tokens, channels),
        "update": normal(len(row_idx), dim),
        "weight": normal(channels, dim),
        "bias": normal(channels) if bias else None,
        "row_idx": row_idx,
    }


def _cross_attention(normal, sequences, queries, keys, heads, first_without=None, head_dim=32):
    lengths = {"queries": [queries] * sequences, "keys": [keys] * sequences}
    if first_without and sequences:
        lengths[first_without][0] = 0
    cu_seqlens = [torch.tensor([0, *one], dtype=torch.int32).cumsum(0, dtype=torch.int32) for one in lengths.values()]
    q, k, v = (normal(sum(lengths[name]), heads, head_dim) for name in ("queries", "keys", "keys"))
    longest = dict(
        zip(("max_seqlen_q", "max_seqlen_k"), (max(one, default=0) for one in lengths.values()), strict=True)
    )
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens[0], "cu_seqlens_k": cu_seqlens[1], **longest}


def _latent_attention(normal, images, rows, channels, tokens, first_without=None):
    lengths = [tokens] * images
    if first_without and images:
        lengths[0] = 0
    q, latent = normal(images, rows, channels), normal(sum(lengths), channels)
    return {"q": q, "latent": latent, "lengths": lengths, "softmax_scale": 0.5}


def _row_softmax(normal, rows, columns, out_dtype=None):
    return {"scores": normal(rows, columns), "scale": 0.5, "out_dtype": out_dtype}


def _conv_norm_act(normal, images, kernel, stride, activation, residual, channels):
    x, out_channels, size = normal(images, 6, 5, channels), 2 * channels, [(side - 1) // stride + 1 for side in (6, 5)]
    statistics = _statistics(x.dtype)
    return {
        "x": x,
        "weight": normal(out_channels, channels, kernel, kernel),
        "scale": normal(out_channels, dtype=statistics),
        "shift": normal(out_channels, dtype=statistics),
        "residual": normal(images, *size, out_channels) if residual else None,
        "stride": stride,
        "activation": activation,
    }


def _stem(normal, images, pool, outputs=4, kernel=7, grey=False, pixels=torch.float32):
    weight = normal(outputs, 3, kernel, kernel)
    scale, shift = (normal(outputs, dtype=_statistics(weight.dtype)) for _ in range(2))
    values = normal(images, 14, 13, 1 if grey else 3, dtype=torch.float32).abs()
    window = torch.tensor([[0.0, 2.0]]).expand(images, 2).contiguous()
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    named = {"pixels": values.to(pixels), "window": window, "mean": mean, "std": std, "weight": weight}
    return {**named, "scale": scale, "shift": shift, "pool": pool}


_MAKERS = {
    "linear": _linear,
    "head_linear": _head_linear,
    "norm_linear": _norm_linear,
    "condition_queries": _condition_queries,
    "inject_rows": _inject_rows,
    "cross_attention": _cross_attention,
    "latent_attention": _latent_attention,
    "row_softmax": _row_softmax,
    "conv_norm_act": _conv_norm_act,
    "stem": _stem,
}
