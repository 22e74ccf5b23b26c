"""Indices of other strides and integers, through the raw ops: every backend reads them as it reads its own."""

import pytest
import torch

from hia_kernels import use_backend
from hia_kernels.core import backend, varlen
from tests.inputs import OPS, small_inputs
from tests.ops.harness import assert_identical, forward_backward
from tests.ops.test_routes import ROUTES

F32 = torch.float32
INDEXED = {op: [name for name in small_inputs(op, F32) if name in varlen.INDICES] for op in OPS}
INDEXED = {op: names for op, names in INDEXED.items() if names}
KERNELS = ("triton", "cublas")


def column(x):
    """Return the values as a column of a table whose other columns are other indices."""
    return torch.stack([x, torch.full_like(x, 7), torch.full_like(x, 9)], dim=1)[:, 0]


OTHERS = {
    "column": column,
    "long": torch.Tensor.long,
    "int": torch.Tensor.int,
    "column-of-long": lambda x: column(x.long()),
    "column-of-int": lambda x: column(x.int()),
    "reversed-back": lambda x: x.repeat_interleave(2)[::2],
}


def raw(op):
    """Return the op without its public function's checks, by name."""

    def call(**arguments):
        overload = getattr(torch.ops.hia, "cross_attention_with_lse" if op == "cross_attention" else op).default
        arguments["softmax_scale"] = 0.3
        names = [argument.name for argument in overload._schema.arguments]
        return overload(*(arguments.get(name, 1e-5) for name in names))

    return call


def assert_reads_any_indices(op, change, inputs):
    changed = {name: OTHERS[change](inputs[name]) for name in INDEXED[op]}
    expected = forward_backward(op, raw(op), inputs)
    assert_identical(forward_backward(op, raw(op), {**inputs, **changed}), expected)


def test_ops_with_indices():
    assert set(INDEXED) == {"cross_attention", "condition_queries", "inject_rows", "norm_linear"}
    assert INDEXED["cross_attention"] == ["cu_seqlens_q", "cu_seqlens_k"]


@pytest.mark.parametrize("change", OTHERS)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in ROUTES if op in INDEXED and name not in KERNELS])
def test_other_strides_and_integers(op, name, change):
    row, inputs = backend.TABLES[op].row(name), small_inputs(op, F32)
    reasons = row.unavailable_reasons() or row.unsupported_reasons(op, **inputs)
    if reasons:
        pytest.skip("; ".join(reasons))
    with use_backend(name):
        assert_reads_any_indices(op, change, inputs)


@pytest.mark.parametrize("change", OTHERS)
def test_in_place(change):
    inputs = small_inputs("inject_rows", F32)
    one, other = (inputs["hidden"].contiguous().clone() for _ in range(2))
    rest = inputs["update"], inputs["weight"], inputs["bias"]
    torch.ops.hia.inject_rows_(one, *rest, inputs["row_idx"])
    torch.ops.hia.inject_rows_(other, *rest, OTHERS[change](inputs["row_idx"]))
    assert torch.equal(one, other)


def test_without_lse():
    inputs = small_inputs("cross_attention", F32) | {"softmax_scale": 0.3}
    expected = torch.ops.hia.cross_attention(*inputs.values())
    for change in OTHERS.values():
        changed = {name: change(inputs[name]) for name in INDEXED["cross_attention"]}
        assert torch.equal(torch.ops.hia.cross_attention(*{**inputs, **changed}.values()), expected)


def test_what_is_no_index_is_refused():
    inputs = small_inputs("cross_attention", F32) | {"softmax_scale": 0.3}
    for dtype in (torch.float32, torch.uint8, torch.bool):
        with pytest.raises(TypeError, match="^hia::cross_attention: cu_seqlens_k must be int32 or int64, got "):
            given = {**inputs, "cu_seqlens_k": inputs["cu_seqlens_k"].to(dtype)}
            torch.ops.hia.cross_attention(*given.values())
    wrapped = {**inputs, "cu_seqlens_q": inputs["cu_seqlens_q"].long() + torch.tensor([0, 0, 2**32])}
    with pytest.raises(ValueError, match=r"^hia::cross_attention: cu_seqlens_q must be less than 2\*\*31, got 42949"):
        torch.ops.hia.cross_attention(*wrapped.values())


def test_what_is_right_is_not_copied():
    inputs = small_inputs("cross_attention", F32)
    args = (inputs["cu_seqlens_q"], None)
    assert varlen.with_index("op", args, 0, "cu_seqlens_q") is args
    assert varlen.with_index("op", args, 1, "row_idx") is args
