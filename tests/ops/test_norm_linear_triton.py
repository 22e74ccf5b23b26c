"""The Triton kernels of ``hia::norm_linear``, in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hia_kernels import last_backend, norm_linear, use_backend
from hia_kernels.core import triton_support
from hia_kernels.ops.norm_linear import library
from hia_kernels.ops.norm_linear.reference import norm_linear_ref
from tests.compare import assert_close
from tests.inputs import norm_linear_inputs as make_inputs
from tests.ops.harness import (
    DTYPES,
    assert_autocast,
    assert_identical,
    assert_matches,
    assert_repeatable,
    forward_backward,
    opcheck,
    upcast,
)
from tests.ops.interpreter import loop_bounds_are_ints  # noqa: F401

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
triton_fwd = pytest.importorskip("hia_kernels.ops.norm_linear.triton_fwd")
pytestmark = pytest.mark.interpreter

OP = "norm_linear"
CASES = [
    pytest.param(33, None, {}, id="all-rows"),
    pytest.param(40, 60, {"bias": False}, id="rows-twice-no-bias"),
    pytest.param(9, 0, {}, id="no-rows"),
    pytest.param(1, 1, {"channels": 16, "dim": 16}, id="one-row"),
    pytest.param(70, 67, {"channels": 100, "dim": 70, "norm_dtype": torch.float32}, id="ragged-fp32-norm"),
    pytest.param(33, None, {"offset": 30.0}, id="mean-30-deviations"),
]


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


@pytest.fixture(params=[True, False], ids=["fused", "norm-then-product"])
def route(request, monkeypatch):
    """Both ways to the same result, whatever the heuristic would choose."""
    monkeypatch.setattr(triton_fwd, "is_fused", lambda *_: request.param)


@pytest.mark.parametrize(("tokens", "rows", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(tokens, rows, options, dtype, triton_device):
    inputs = make_inputs(tokens, rows, dtype, triton_device, **options)
    assert_matches(OP, norm_linear, norm_linear_ref, inputs, dtype)
    assert last_backend(OP) == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routes_agree_with_the_reference(route, dtype, triton_device):
    inputs = make_inputs(70, 75, dtype, triton_device, channels=144, dim=136, offset=10.0)
    plain, exact = norm_linear_ref(**inputs), norm_linear_ref(**upcast(inputs, torch.float64))
    assert_close("out", norm_linear(**inputs), exact, plain, dtype=dtype)


def test_which_route():
    """Sizes of the 13B host go through cuBLAS; few rows and narrow hosts through one kernel."""
    assert not triton_fwd.is_fused(256, 5120, 5120, torch.bfloat16)
    assert not triton_fwd.is_fused(1568, 5120, 10240, torch.bfloat16)
    assert triton_fwd.is_fused(8, 5120, 5120, torch.bfloat16)
    assert triton_fwd.is_fused(256, 768, 768, torch.bfloat16)
    assert not triton_fwd.is_fused(32768, 768, 768, torch.bfloat16)
    assert not triton_fwd.is_fused(256, 768, 768, torch.float32)


def test_rows_longer_than_a_chunk_of_the_index(monkeypatch, triton_device):
    """A row named often, across chunks of row_idx, gets the sum in the order of the names."""
    triton_bwd = pytest.importorskip("hia_kernels.ops.norm_linear.triton_bwd")
    monkeypatch.setattr(triton_bwd, "IDX_CHUNK", 16)
    inputs = make_inputs(5, 70, torch.float32, triton_device)
    inputs["row_idx"][:30] = 2
    assert_matches(OP, norm_linear, norm_linear_ref, inputs, torch.float32)


def test_partial_gradients(triton_device):
    inputs = make_inputs(9, 5, torch.float32, triton_device)
    x, norm_weight, norm_bias, weight, _, row_idx, eps = inputs.values()
    dout = torch.randn(32, 5, device=triton_device).T
    arguments = (dout, x, norm_weight, norm_bias, weight, row_idx, eps)
    complete = torch.ops.hia.norm_linear_bwd(*arguments, [True] * 5)
    for mask in ([True, False, False, False, False], [False, True, False, False, False], [False] * 3 + [True, False]):
        some = torch.ops.hia.norm_linear_bwd(*arguments, mask)
        for position, wanted in enumerate(mask):
            if wanted:
                assert torch.equal(some[position], complete[position])
        torch.library.opcheck(torch.ops.hia.norm_linear_bwd.default, (*arguments, mask))


def test_opcheck_and_strides(route, triton_device):
    inputs = make_inputs(9, 5, torch.float32, triton_device, channels=16, dim=8)
    opcheck(OP, torch.ops.hia.norm_linear.default, inputs)
    inputs["x"], inputs["weight"] = (inputs[name].T.contiguous().T for name in ("x", "weight"))
    assert_matches(OP, norm_linear, norm_linear_ref, inputs, torch.float32)


def test_nan_in_rows_not_selected_does_not_leak(route, triton_device):
    inputs = make_inputs(40, 12, torch.float32, triton_device)
    dirty = torch.full((42, 80), float("nan"), device=triton_device)[1:-1, 8:56].copy_(inputs["x"])
    untouched = torch.ones(40, dtype=torch.bool, device=triton_device).index_fill(0, inputs["row_idx"], False)
    dirty[untouched] = float("nan")
    clean = forward_backward(OP, norm_linear, inputs)
    assert_identical(forward_backward(OP, norm_linear, {**inputs, "x": dirty}), clean)
    assert not clean["dx"][untouched].any()


def test_two_runs_are_bit_identical(route, triton_device):
    assert_repeatable(OP, norm_linear, make_inputs(20, 90, torch.float32, triton_device))


def test_gathering_first_gives_the_same_bits(route, triton_device):
    inputs = make_inputs(40, 12, torch.float32, triton_device)
    gathered = {**inputs, "x": inputs["x"][inputs["row_idx"]], "row_idx": None}
    assert torch.equal(norm_linear(**inputs), norm_linear(**gathered))


def test_autocast(triton_device):
    inputs = make_inputs(9, 5, torch.float32, triton_device)
    assert_autocast(
        OP, norm_linear, inputs, torch.bfloat16, cast=("x", "weight", "bias"), out_dtype=torch.bfloat16
    )  # fmt: skip


def test_reasons(triton_device):
    for x in (torch.ones(2, 16385, device=triton_device), torch.ones(2, 3, dtype=torch.float64, device=triton_device)):
        norm = x[0]
        with pytest.raises(NotImplementedError, match="channels must be at most 16384, got 16385|float64 is left"):
            norm_linear(x, norm, norm, x)
    assert library._triton_unsupported(x.float(), torch.ones(3, 16385)) == ["channels must be at most 16384, got 16385"]


@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(1, 80), rows=st.none() | st.integers(1, 90), channels=st.integers(1, 150),
    dim=st.integers(1, 150), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(tokens, rows, channels, dim, dtype):
    inputs = make_inputs(tokens, rows, dtype, channels=channels, dim=dim)
    if triton_support.interpreted():
        plain, exact = norm_linear_ref(**inputs), norm_linear_ref(**upcast(inputs, torch.float64))
        assert_close("out", norm_linear(**inputs), exact, plain, dtype=dtype)
