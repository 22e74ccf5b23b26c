"""Results of Triton's rows are tensors of their own, in the interpreter or on a GPU."""

from itertools import islice

import pytest
import torch

from tests.ops.fresh import assert_can_be_written_to, calls
from tests.ops.test_conv_norm_act_cudnn import calls as cudnn_calls  # noqa: F401
from tests.ops.test_routes import ROUTES
from tests.ops.test_zero_sizes_triton import batched_products  # noqa: F401

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # NumPy's, of -inf
SLOW = {"stem": 3}  # ops of which these many calls will do


@pytest.mark.parametrize(("op", "name"), [route for route in ROUTES if route[1] in ("triton", "cublas")])
def test_what_comes_back_can_be_written_to(op, name, batched_products, triton_device):  # noqa: F811
    for inputs in islice(calls(op, torch.float32, triton_device), SLOW.get(op)):
        assert assert_can_be_written_to(op, name, inputs)


def test_what_comes_back_from_cudnn_can_be_written_to(cudnn_calls, triton_device):  # noqa: F811
    for inputs in calls("conv_norm_act", torch.float32, triton_device):
        assert assert_can_be_written_to("conv_norm_act", "cudnn", inputs)
