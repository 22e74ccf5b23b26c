"""Every op under ``torch.set_default_dtype`` of 16 bits: its results keep their bits."""

import pytest
import torch

import hia_kernels
from hia_kernels import use_backend
from hia_kernels.core import backend
from tests.inputs import OPS, small_inputs
from tests.ops.harness import assert_default_dtype_changes_no_bit, default_dtype
from tests.ops.test_routes import ROUTES, inputs_for

F32 = torch.float32


@pytest.mark.parametrize(("op", "name"), ROUTES)
def test_no_bit_changes(op, name):
    row, inputs = backend.TABLES[op].row(name), inputs_for(op, name)
    reasons = row.unavailable_reasons() or row.unsupported_reasons(op, **inputs)
    if reasons:
        pytest.skip("; ".join(reasons))
    with use_backend(name):
        assert_default_dtype_changes_no_bit(op, getattr(hia_kernels, op), inputs)


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_drawn_the_same(op):
    expected = small_inputs(op, F32)
    with default_dtype(torch.bfloat16):
        got = small_inputs(op, F32)
    for name, x in expected.items():
        if isinstance(x, torch.Tensor):
            assert got[name].dtype == x.dtype and torch.equal(got[name], x), name
