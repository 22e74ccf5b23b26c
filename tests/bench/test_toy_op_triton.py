"""The Triton kernel of the toy op, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from hia_kernels import use_backend
from hia_kernels.core import triton_support

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
pytestmark = pytest.mark.interpreter


def test_its_kernel_is_dispatched_to(toy):
    reasons = triton_support.unavailable_reasons()
    if reasons:
        pytest.skip(f"TRITON KERNELS: {'; '.join(reasons)}")
    device = "cpu" if triton_support.interpreted() else "cuda"
    given = toy.inputs.make_inputs(toy.inputs.Shape(5, 1100), torch.float32, device, strided=True)
    with use_backend("triton"):
        got = toy.public(**given)
    torch.testing.assert_close(got, toy.reference(**given))
