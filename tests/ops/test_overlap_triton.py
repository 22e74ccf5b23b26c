"""``inject_rows_`` with views of what it writes, in Triton's kernels: tiles are written before others are read."""

import pytest
import torch

from hia_kernels import inject_rows, inject_rows_, last_backend, use_backend
from tests.ops.test_overlap import OVERLAPS, ROWS, assert_injects_as_if_apart, injection

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize(("name", "place"), OVERLAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inject_rows_with_a_view_of_hidden(name, place, dtype, triton_device):
    with use_backend("triton"):
        assert_injects_as_if_apart(name, place, dtype, triton_device)
    assert last_backend("inject_rows") == "triton"


@pytest.mark.parametrize("served", ["triton", "cublas"])
def test_inject_rows_with_indices_inside_hidden(served, triton_device):
    inputs = injection(device=triton_device)
    inside = inputs["hidden"][ROWS : ROWS + 2].view(-1).view(torch.int64)[:ROWS]
    inside.copy_(inputs["row_idx"])
    with use_backend(served):
        expected = inject_rows(**inputs)
        assert torch.equal(inject_rows_(**{**inputs, "row_idx": inside}), expected)
