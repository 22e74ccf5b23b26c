"""Results of the CPU's rows are tensors of their own: no views, no input's memory, no other result's."""

import pytest
import torch

import hia_kernels
from hia_kernels import use_backend
from hia_kernels.core.fresh import channels_last, reshaped
from hia_kernels.ops.conv_norm_act import conv_norm_act_packed, pack_conv
from tests.inputs import OPS, small_inputs
from tests.ops.fresh import assert_can_be_written_to, calls
from tests.ops.harness import assert_fresh, skip_unless_here
from tests.ops.test_routes import ROUTES

F32 = torch.float32
ROWS = [(op, "auto") for op in OPS] + [(op, name) for op, name in ROUTES if name in ("native", "cpu", "reference")]


@pytest.mark.parametrize(("op", "name"), ROWS)
def test_what_comes_back_can_be_written_to(op, name):
    served = [
        assert_can_be_written_to(op, name, inputs)
        for dtype in (F32, torch.bfloat16, torch.float64)
        for inputs in calls(op, dtype)
    ]
    if not any(served):
        pytest.skip("cannot run here")


@pytest.mark.parametrize("name", ["auto", "cpu", "reference"])
def test_gradients_that_are_added_up_leave_the_incoming_one_alone(name):
    """Check what ``backward()`` keeps: the hidden states' gradient is the incoming one."""
    inputs = small_inputs("inject_rows", F32)
    hidden = inputs["hidden"].detach().requires_grad_()
    dout = torch.randn(hidden.shape)
    before = dout.clone()
    with use_backend(name):
        for _ in range(2):
            hia_kernels.inject_rows(**{**inputs, "hidden": hidden}).backward(dout)
    hidden.grad += 1
    assert torch.equal(dout, before) and torch.equal(hidden.grad, 2 * before + 1)


@pytest.mark.parametrize("name", ["native", "cpu"])
@pytest.mark.parametrize("residual", [False, True])
def test_packed_convolutions_return_no_views(name, residual):
    skip_unless_here(name)
    ones, x = torch.ones(32), torch.randn(2, 5, 4, 32)
    for kernel, stride in ((1, 1), (1, 2), (3, 1), (3, 2)):
        with use_backend(name):
            packed = pack_conv(torch.randn(32, 32, kernel, kernel), ones, ones, stride)
            added = conv_norm_act_packed(x, packed) if residual else None
            assert_fresh({"x": x, "added": added}, [conv_norm_act_packed(x, packed, added)], {})


def test_the_log_sum_exp_of_rows_in_place_is_no_view():
    scores = torch.randn(5, 9)
    for name in ("auto", "reference"):
        with use_backend(name):
            assert_fresh({"scores": scores}, [hia_kernels.row_softmax_(scores, 0.5)], {})


def test_reshaped_shares_memory_and_is_no_view():
    x = torch.arange(24.0)
    y = reshaped(x[6:18].view(3, 4), 2, 6)
    assert torch.equal(y, torch.arange(6.0, 18.0).view(2, 6)) and not y._is_view()
    assert y.data_ptr() == x[6:].data_ptr()
    assert reshaped(x[:0], 3, 0).shape == (3, 0)


def test_channels_last_copies_only_where_it_must():
    y = torch.randn(2, 3, 4, 5)
    copied, kept = channels_last(y), channels_last(last := y.contiguous(memory_format=torch.channels_last))
    for x in (copied, kept):
        assert torch.equal(x, y.permute(0, 2, 3, 1)) and x.is_contiguous() and not x._is_view()
    assert kept.data_ptr() == last.data_ptr()
