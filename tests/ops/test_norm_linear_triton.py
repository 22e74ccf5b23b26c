"""Triton kernels of ``hia::norm_linear``, in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hia_kernels import last_backend, norm_linear, use_backend
from hia_kernels.core import registration, triton_support
from hia_kernels.ops.norm_linear import library
from hia_kernels.ops.norm_linear.reference import norm_linear_ref
from hia_kernels.testing import analysed, assert_close
from tests.inputs import inputs_of
from tests.ops.harness import (
    DTYPES,
    assert_autocast,
    assert_identical,
    assert_matches,
    assert_repeatable,
    forward_backward,
    opcheck,
)

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
triton_fwd = pytest.importorskip("hia_kernels.ops.norm_linear.triton_fwd")
pytestmark = pytest.mark.interpreter

OP = "norm_linear"
make_inputs = inputs_of(OP)
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


@pytest.fixture(params=["triton", "cublas"])
def route(request):
    """Force each way to the same result, whatever the table would choose."""
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize(("tokens", "rows", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(tokens, rows, options, dtype, triton_device):
    inputs = make_inputs(tokens, rows, dtype, triton_device, **options)
    assert_matches(OP, norm_linear, norm_linear_ref, inputs, dtype)
    assert last_backend(OP) == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routes_agree_with_the_reference(route, dtype, triton_device):
    inputs = make_inputs(70, 75, dtype, triton_device, channels=144, dim=136, offset=10.0)
    plain, exact = norm_linear_ref(**inputs), norm_linear_ref(**analysed(inputs, dtype))
    assert_close("out", norm_linear(**inputs), exact, plain, dtype=dtype)
    assert last_backend(OP) == route


@pytest.mark.parametrize("backward", [False, True])
def test_which_row_of_the_table(backward, triton_device, monkeypatch):
    """Send the 13B host's sizes through cuBLAS, few rows and narrow hosts through one kernel; nothing is computed."""
    monkeypatch.setattr(triton_support, "device_reasons", lambda tensor: [])  # meta tensors cost nothing

    def chosen(rows, channels, dim, dtype=torch.bfloat16, tokens=None):
        x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((rows, channels), (dim, channels)))
        row_idx = None
        if tokens is not None:
            x, row_idx = x.new_empty(tokens, channels), torch.empty(rows, dtype=torch.int64, device="meta")
        norm = (x.new_empty(channels),) * 2
        if backward:
            arguments = (x.new_empty(rows, dim), x, *norm, weight, row_idx, 1e-5, [True] * 5)
        else:
            arguments = (x, *norm, weight, None, row_idx, 1e-5)
        name = f"{OP}_bwd" if backward else OP
        library.BACKENDS.select(name, registration.bind(name, arguments))
        return last_backend(OP)

    with use_backend("auto"):
        assert chosen(256, 5120, 5120) == "cublas"
        assert chosen(1568, 5120, 10240) == "cublas"
        assert chosen(8, 5120, 5120) == "triton"
        assert chosen(8, 5120, 5120, tokens=9000) == "triton"
        assert chosen(256, 768, 768) == "triton"
        assert chosen(32768, 768, 768) == "cublas"
        assert chosen(256, 768, 768, torch.float32) == "cublas"
    for forced in ("triton", "cublas"):
        with use_backend(forced):
            assert chosen(8, 5120, 5120) == chosen(1568, 5120, 10240) == forced


def test_why_not_the_one_kernel():
    found = library.fused_is_slower(1568, 5120, 10240, torch.bfloat16)
    assert found == [
        "a tile's rows are 655360 bytes, more than 262144: cublas reads them once",
        "the product is 164416716800 FLOPs, more than 4294967296: cublas is the better at it",
    ]


@pytest.mark.parametrize(("rows", "channels", "dim"), [(0, 16, 8), (3, 0, 8), (3, 16, 0), (3, 0, 0)])
def test_nothing_to_do(route, rows, channels, dim, triton_device):
    x, norm = torch.randn(rows, channels, device=triton_device), torch.ones(channels, device=triton_device)
    weight, bias = torch.randn(dim, channels, device=triton_device), torch.randn(dim, device=triton_device)
    assert torch.equal(norm_linear(x, norm, norm, weight, bias), norm_linear_ref(x, norm, norm, weight, bias, None, 0))


def test_grid_of_many_rows(monkeypatch):
    """Launch millions of rows, though axes y and z of a grid end at 65,535."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(triton_fwd, "_norm_linear_fused_kernel", Kernel())
    x, weight = (torch.empty(rows, 16, dtype=torch.bfloat16, device="meta") for rows in (2**27, 200))
    triton_fwd.norm_linear_fwd(x, x[0], x[0], weight, None, None, 1e-5)
    assert grids == [(2**27 // 64 * 2,)]


@pytest.mark.gpu
@pytest.mark.slow
def test_more_tiles_of_rows_than_an_axis_has():
    rows = 65_536 * triton_fwd.BLOCK_M + 5
    x = torch.randn(rows, 16, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(16, 16, dtype=torch.bfloat16, device="cuda")
    out = norm_linear(x, x[0], x[1], weight)
    assert torch.equal(out[-70:], norm_linear(x[-70:], x[0], x[1], weight))


def test_rows_longer_than_a_chunk_of_the_index(monkeypatch, triton_device):
    """Name a row often, across chunks of row_idx: it gets the sum in the order of the names."""
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
    assert_autocast(OP, norm_linear, inputs, torch.bfloat16, cast=("x", "weight", "bias"), out_dtype=torch.bfloat16)


def test_a_norm_in_the_other_halves(triton_device):
    """Run an fp16 model's norm beside bf16, as autocast leaves it: the bits of the same values in fp32."""
    norms = ("norm_weight", "norm_bias")
    for dtype, other in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        inputs = make_inputs(9, 5, dtype, triton_device)
        inputs |= {name: inputs[name].to(other) for name in norms}
        got = forward_backward(OP, norm_linear, inputs)
        expected = forward_backward(OP, norm_linear, {**inputs, **{name: inputs[name].float() for name in norms}})
        assert_identical(got, expected | {f"d{name}": expected[f"d{name}"].to(other) for name in norms})


def test_reasons(triton_device):
    for x in (torch.ones(2, 16385, device=triton_device), torch.ones(2, 3, dtype=torch.float64, device=triton_device)):
        norm = x[0]
        with pytest.raises(NotImplementedError, match="channels must be at most 16384, got 16385|float64 is left"):
            norm_linear(x, norm, norm, x)
    reasons = library._triton_unsupported(OP, x=torch.ones(3, 16385, device=triton_device))
    assert reasons == ["channels must be at most 16384, got 16385"]


@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(1, 80),
    rows=st.none() | st.integers(1, 90),
    channels=st.integers(1, 150),
    dim=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(tokens, rows, channels, dim, dtype):
    inputs = make_inputs(tokens, rows, dtype, channels=channels, dim=dim)
    if triton_support.interpreted():
        plain, exact = norm_linear_ref(**inputs), norm_linear_ref(**analysed(inputs, dtype))
        assert_close("out", norm_linear(**inputs), exact, plain, dtype=dtype)
