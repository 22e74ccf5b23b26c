"""Every op's Triton kernels under ``torch.set_default_dtype`` of 16 bits, in the interpreter."""

import pytest
import torch

import hia_kernels
from hia_kernels import last_backend, use_backend
from hia_kernels.core import backend
from tests.inputs import small_inputs
from tests.ops.harness import assert_default_dtype_changes_no_bit
from tests.ops.test_routes import ROUTES

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
pytestmark = pytest.mark.interpreter

KERNELS = [(op, name) for op, name in ROUTES if name in ("triton", "cublas")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_no_bit_changes(op, name, dtype, triton_device):
    inputs, row = small_inputs(op, dtype, triton_device), backend.TABLES[op].row(name)
    if name == "cublas" and (reasons := row.unavailable_reasons() or row.unsupported_reasons(op, **inputs)):
        pytest.skip("; ".join(reasons))
    with use_backend(name):
        assert_default_dtype_changes_no_bit(op, getattr(hia_kernels, op), inputs)
    assert last_backend(op) == name
