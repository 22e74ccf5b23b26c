"""Axes of size 0 in Triton's kernels and what goes with them, in the interpreter or on a GPU."""

import dataclasses

import pytest
import torch

from hia_kernels.core import backend
from tests.ops.test_conv_norm_act_cudnn import calls as cudnn_calls  # noqa: F401
from tests.ops.zero_sizes import AXES, cases, compare

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # NumPy's, of -inf

ROUTES = [(op, row.name) for op in AXES for row in backend.TABLES[op].backends if row.name in ("triton", "cublas")]


@pytest.fixture
def batched_products(monkeypatch):
    """Let the rows whose products are plain cuBLAS run where there is none: PyTorch multiplies for both."""
    for op in ("linear", "head_linear"):
        table = backend.TABLES[op]
        assert table.backends[0].name == "cublas"
        reasons = {"unavailable_reasons": list, "unsupported_reasons": lambda *args, **arguments: []}
        row = dataclasses.replace(table.backends[0], **reasons)
        monkeypatch.setattr(table, "backends", [row, *table.backends[1:]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "name"), ROUTES)
def test_every_kernel_is_as_the_reference(op, name, dtype, batched_products, triton_device):
    for case in cases(op, at_most=1 if op == "cross_attention" else 2):
        assert compare(case, dtype, name, triton_device), case


def test_cudnn_is_as_the_reference(cudnn_calls, triton_device):  # noqa: F811
    for case in cases("conv_norm_act"):
        assert compare(case, torch.float32, "cudnn", triton_device), case
