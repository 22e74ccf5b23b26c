"""NaN and infinities in the Triton kernels, in the interpreter or on a GPU: nothing that they reach stays finite."""

from importlib import import_module

import pytest
import torch

from hia_kernels.core import backend
from tests.inputs import OPS, small_inputs
from tests.ops.not_finite import (
    INF,
    NAN,
    assert_attention_loses_nothing,
    assert_op_loses_nothing,
    spoilt_attention,
)

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # NumPy's, of NaN

ATTENTION = "hia_kernels.ops.cross_attention.triton_"
LEFT_OUT = {("stem", name) for name in ("window", "mean", "std")}  # finite on a CPU, whose values are checked
HOW = ("q-row-nan", "k-all-nan", "v-element-nan", "overflow", "all-scores-minus-inf", "scale-nan")


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("head_dim", "dtype"), [(32, torch.bfloat16), (272, torch.bfloat16)], ids=["fused", "unfused"])
@pytest.mark.parametrize("how", HOW)
def test_attention_loses_nothing(how, head_dim, dtype, splits, monkeypatch, triton_device):
    heuristic = import_module(f"{ATTENTION}split").SplitHeuristic(splits, splits, 1)
    for name in ("fwd", "bwd", "unfused_fwd", "unfused_bwd"):
        monkeypatch.setattr(import_module(ATTENTION + name), "split_heuristic", lambda *sizes: heuristic)
    lengths = ([3, 2], [100 if splits > 1 else 20, 0])
    inputs = spoilt_attention(*lengths, dtype, how, head_dim=head_dim, heads=1)
    inputs = {name: x.to(triton_device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    assert_attention_loses_nothing(inputs, how, "triton")


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("op", [op for op in OPS if backend.TABLES[op].row("triton")])
def test_every_kernel_loses_nothing(op, value, triton_device):
    inputs = small_inputs(op, torch.float32, triton_device)
    for argument, x in inputs.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point() and (op, argument) not in LEFT_OUT:
            assert_op_loses_nothing(op, "triton", inputs, argument, "element" if value is not NAN else "row", value)
