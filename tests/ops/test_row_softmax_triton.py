"""Triton kernels of ``hia::row_softmax``, in the interpreter or on a GPU."""

import pytest
import torch

from hia_kernels import last_backend, row_softmax, row_softmax_, use_backend
from hia_kernels.core import triton_support
from hia_kernels.ops.row_softmax import library
from hia_kernels.ops.row_softmax.reference import row_softmax_bwd_ref, row_softmax_ref
from hia_kernels.testing import analysed, assert_close, upcast
from tests.inputs import inputs_of
from tests.ops.harness import DTYPES, HALVES, assert_matches, assert_repeatable, forward_backward, opcheck

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
pytestmark = pytest.mark.interpreter

OP = "row_softmax"
make_inputs = inputs_of(OP)
CASES = [
    pytest.param(33, 64, {}, id="several-rows-a-program"),
    pytest.param(5, 300, {"scale": -0.3}, id="ragged-negative-scale"),
    pytest.param(1, 1, {}, id="one-score"),
    pytest.param(0, 9, {}, id="no-rows"),
    pytest.param(3, 0, {}, id="no-columns"),
    pytest.param(3, 5000, {"spread": 40.0}, id="one-row-a-program"),
    pytest.param(2, 20000, {"spread": 400.0}, id="in-chunks-and-overflow"),
    pytest.param(2, 65536, {}, id="longest-promised"),
]


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


@pytest.mark.parametrize(("rows", "columns", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(rows, columns, options, dtype, triton_device):
    inputs = make_inputs(rows, columns, dtype, triton_device, **options)
    assert_matches(OP, row_softmax, row_softmax_ref, inputs, dtype)
    assert last_backend(OP) == "triton"


@pytest.mark.parametrize("columns", [200, 17000])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_fp32_scores_half_probabilities(columns, dtype, triton_device):
    inputs = make_inputs(3, columns, torch.float32, triton_device, out_dtype=dtype)
    got, plain = (forward_backward(OP, function, inputs) for function in (row_softmax, row_softmax_ref))
    exact = forward_backward(OP, row_softmax_ref, {**upcast(inputs, torch.float64), "out_dtype": None})
    assert_close("lse", got["lse"], exact["lse"], plain["lse"], dtype=torch.float32)
    assert_close("out", got["out"], exact["out"], plain["out"], dtype=dtype)
    assert_close("dscores", got["dscores"], exact["dscores"], plain["dscores"], dtype=dtype, slack=4)


def inside_nan(scores, margin):
    """Return a tensor of NaN and the view inside it, ``margin`` columns from either side, that holds the scores."""
    rows, columns = scores.shape
    wide = torch.full((rows, columns + 2 * margin), float("nan"), device=scores.device, dtype=scores.dtype)
    return wide, wide[:, margin : margin + columns].copy_(scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [70, 20000])
def test_in_place_in_misaligned_rows(columns, dtype, triton_device):
    """Write where a vector can't be stored: threads hold other elements then, and sum the row in another order."""
    inputs = {"scores": make_inputs(2, columns, dtype, triton_device)["scores"], "scale": 0.5}
    exact, plain = row_softmax_ref(**analysed(inputs, dtype)), row_softmax_ref(**inputs)
    wide, scores = inside_nan(inputs["scores"], 3)
    lse = row_softmax_(scores, 0.5)
    assert_close("lse", lse, exact[1], plain[1], dtype=torch.float32)
    assert_close("p", scores, exact[0], plain[0], dtype=dtype)
    assert wide[:, :3].isnan().all() and wide[:, 3 + columns :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("columns", "margin"), [(70, 16), (70, 13), (20000, 16), (20001, 3), (65536, 16)])
def test_in_place_gives_the_same_bits_and_touches_nothing_else(columns, margin, dtype, triton_device):
    """Take what docs/row_softmax.md promises: rows of whole multiples of 16, or a number of columns that is none."""
    wide, scores = inside_nan(make_inputs(2, columns, dtype, triton_device)["scores"], margin)
    p, lse = row_softmax(scores, 0.5)
    assert torch.equal(row_softmax_(scores, 0.5), lse) and torch.equal(scores, p)
    assert wide[:, :margin].isnan().all() and wide[:, margin + columns :].isnan().all()
    column_major = make_inputs(columns, 2, dtype, triton_device)["scores"].T
    p, lse = row_softmax(column_major, 0.5)
    assert torch.equal(row_softmax_(column_major, 0.5), lse) and torch.equal(column_major, p)
    assert last_backend(OP) == "triton"


@pytest.mark.parametrize("columns", [64, 70, 5000, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_together_are_one_at_a_time_bit_for_bit(columns, dtype, triton_device):
    inputs = make_inputs(5, columns, torch.float32, triton_device, out_dtype=dtype)
    dp = make_inputs(5, columns, torch.float32, triton_device, spread=1.0)["scores"].flip(0)
    p, lse = row_softmax(**inputs)
    ds = torch.ops.hia.row_softmax_bwd(dp, p, 0.25, lse)
    for row in (slice(r, r + 1) for r in range(5)):
        one, one_lse = row_softmax(**{**inputs, "scores": inputs["scores"][row]})
        assert torch.equal(one, p[row]) and torch.equal(one_lse, lse[row])
        assert torch.equal(torch.ops.hia.row_softmax_bwd(dp[row], p[row], 0.25, lse[row]), ds[row])
    assert last_backend(OP) == "triton"


@pytest.mark.parametrize("columns", [50, 17000])
def test_backward_takes_a_wider_dp_and_dlse(columns, triton_device):
    inputs = make_inputs(3, columns, torch.float32, triton_device, out_dtype=torch.bfloat16)
    p, lse = row_softmax(**inputs)
    dp = make_inputs(columns, 3, torch.float32, triton_device)["scores"].T  # strides that are not rows'
    for arguments in ((dp, p, 0.25), (dp, p, 0.25, lse), (dp.bfloat16(), p, 0.25)):
        got, plain = torch.ops.hia.row_softmax_bwd(*arguments), row_softmax_bwd_ref(*arguments)
        exact = row_softmax_bwd_ref(*(x.double() if isinstance(x, torch.Tensor) else x for x in arguments))
        assert got.dtype == torch.bfloat16
        assert_close("ds", got, exact, plain, dtype=torch.bfloat16, slack=4)
    assert last_backend(OP) == "triton"


@pytest.mark.parametrize("columns", [60, 20000])
def test_infinite_and_nan_scores(columns, triton_device):
    """Keep a first chunk of -inf from poisoning the row."""
    inputs = make_inputs(4, columns, torch.float32, triton_device)
    scores = inputs["scores"]
    scores[0, : columns - 10] = scores[1] = float("-inf")
    scores[2, 5] = float("nan")
    p, lse = row_softmax(**inputs)
    few, few_lse = row_softmax_ref(scores[:1, -10:], inputs["scale"])
    exact, exact_lse = row_softmax_ref(scores[:1, -10:].double(), inputs["scale"])
    assert_close("p", p[:1, -10:], exact, few, dtype=torch.float32)
    assert_close("lse", lse[:1], exact_lse, few_lse, dtype=torch.float32)
    assert not p[0, : columns - 10].any() and p[1:3].isnan().all() and p[3].isfinite().all()
    assert lse[1] == float("-inf") and lse[2].isnan()


def test_two_runs_are_bit_identical(triton_device):
    for columns in (100, 20000):
        assert_repeatable(OP, row_softmax, make_inputs(3, columns, torch.float32, triton_device))


def test_opcheck(triton_device):
    opcheck(OP, torch.ops.hia.row_softmax.default, make_inputs(3, 5, torch.float32, triton_device))


def test_fp64_is_left_to_the_reference(triton_device):
    scores = torch.ones(2, 3, dtype=torch.float64, device=triton_device)
    with pytest.raises(NotImplementedError, match="triton: float64 is left to the reference"):
        row_softmax(scores, 1.0)
    assert not library._triton_unsupported("row_softmax_bwd", dp=scores, p=scores.float())
    assert triton_support.unavailable_reasons() == []
