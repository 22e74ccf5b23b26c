"""Indices of other strides and integers, in Triton's kernels: they read int32 and int64 one after another."""

import pytest
import torch

from hia_kernels import last_backend, use_backend
from tests.inputs import small_inputs
from tests.ops.test_indices import INDEXED, KERNELS, OTHERS, ROUTES, assert_reads_any_indices

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("change", ["column", "long", "column-of-int"])
@pytest.mark.parametrize(("op", "name"), [route for route in ROUTES if route[0] in INDEXED and route[1] in KERNELS])
def test_other_strides_and_integers(op, name, change, triton_device):
    with use_backend(name):
        assert_reads_any_indices(op, change, small_inputs(op, torch.float32, triton_device))
    assert last_backend(op) == name


@pytest.mark.parametrize("change", OTHERS)
def test_the_unfused_route(change, triton_device):
    inputs = small_inputs("cross_attention", torch.float16, triton_device)
    wide = {name: x.repeat(1, 1, 272 // 16)[..., :272] for name, x in inputs.items() if name in "qkv"}
    with use_backend("triton"):
        assert_reads_any_indices("cross_attention", change, {**inputs, **wide})
