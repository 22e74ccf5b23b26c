"""``hia::row_softmax`` and its in-place form."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from hia_kernels import row_softmax, row_softmax_
from hia_kernels.core.backend import Backend
from hia_kernels.ops.row_softmax.library import BACKENDS
from hia_kernels.ops.row_softmax.reference import row_softmax_bwd_ref, row_softmax_inplace_ref, row_softmax_ref
from hia_kernels.testing import FP64_SLACK, analysed, assert_close, upcast
from tests.inputs import inputs_of
from tests.ops.harness import (
    DTYPES,
    HALVES,
    assert_backward_is_autograd_of_reference,
    assert_compiles,
    assert_exports,
    assert_gradcheck,
    assert_identical,
    assert_matches,
    assert_repeatable,
    flops,
    flops_by_op,
    forward_backward,
    opcheck,
)

OP = "row_softmax"
make_inputs = inputs_of(OP)
CASES = [
    pytest.param(33, 64, {}, id="plain"),
    pytest.param(7, 100, {"scale": -0.3}, id="ragged-negative-scale"),
    pytest.param(1, 1, {}, id="one-score"),
    pytest.param(0, 9, {}, id="no-rows"),
    pytest.param(5, 0, {}, id="no-columns"),
    pytest.param(5, 300, {"spread": 400.0}, id="scores-that-overflow-exp"),
    pytest.param(10240, 784, {}, id="13b-extract-one-image", marks=pytest.mark.gpu),
]


def softmax_in_place(scores, scale):
    scores = scores.contiguous().clone()
    return scores, row_softmax_(scores, scale)


def with_lse_only(**inputs):
    return row_softmax(**inputs)[1]


@pytest.mark.parametrize(("rows", "columns", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(rows, columns, options, dtype, device):
    assert_matches(OP, row_softmax, row_softmax_ref, make_inputs(rows, columns, dtype, device, **options), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_fp32_scores_half_probabilities(dtype, device):
    """Round only p: the truth is the fp64 of the fp32 scores. This is the main use."""
    inputs = make_inputs(33, 200, torch.float32, device, out_dtype=dtype)
    got, plain = (forward_backward(OP, function, inputs) for function in (row_softmax, row_softmax_ref))
    exact = forward_backward(OP, row_softmax_ref, {**upcast(inputs, torch.float64), "out_dtype": None})
    assert got["out"].dtype == dtype and got["lse"].dtype == got["dscores"].dtype == torch.float32
    assert_close("lse", got["lse"], exact["lse"], plain["lse"], dtype=torch.float32)
    assert_close("out", got["out"], exact["out"], plain["out"], dtype=dtype)
    assert_close("dscores", got["dscores"], exact["dscores"], plain["dscores"], dtype=dtype, slack=4)


def test_backward_is_autograd_of_reference(device):
    inputs = make_inputs(9, 40, torch.float64, device)
    assert_backward_is_autograd_of_reference(OP, row_softmax, row_softmax_ref, inputs)


def test_agrees_with_pytorch(device):
    """Check the reference against torch.softmax, torch.logsumexp, and autograd of the former."""
    inputs = make_inputs(9, 40, torch.float64, device)
    scores = inputs["scores"].detach().requires_grad_()
    scaled = scores * inputs["scale"]
    expected = torch.softmax(scaled, 1)
    p, lse = row_softmax(**inputs)
    assert_close("p", p, expected.detach(), expected.detach(), dtype=torch.float64, slack=FP64_SLACK)
    truth = torch.logsumexp(scaled.detach(), 1)
    assert_close("lse", lse, truth, truth, dtype=torch.float64, slack=FP64_SLACK)
    dp = torch.randn(9, 40, dtype=torch.float64).to(device)
    (truth,) = torch.autograd.grad(expected, scores, dp)
    ds = torch.ops.hia.row_softmax_bwd(dp, p, inputs["scale"])
    assert_close("ds", ds, truth, truth, dtype=torch.float64, slack=FP64_SLACK)


def test_gradcheck():
    assert_gradcheck(OP, row_softmax, make_inputs(4, 5, torch.float64))
    assert_gradcheck(OP, with_lse_only, make_inputs(3, 4, torch.float64))


def test_opcheck(device):
    inputs = make_inputs(9, 5, torch.float32, device)
    opcheck(OP, torch.ops.hia.row_softmax.default, inputs)
    opcheck(OP, torch.ops.hia.row_softmax.default, {**inputs, "out_dtype": torch.bfloat16})
    column_major = {**inputs, "scores": inputs["scores"].T.contiguous().T}
    opcheck(OP, torch.ops.hia.row_softmax.default, column_major)
    torch.library.opcheck(torch.ops.hia.row_softmax_.default, (inputs["scores"].clone(), 0.5))
    p, lse = row_softmax(**inputs)
    dp = torch.randn(5, 9, device=device).T
    for arguments in ((dp, p, 0.5), (dp, p.bfloat16(), 0.5, lse), (dp, p.T.contiguous().T, 0.5, None)):
        torch.library.opcheck(torch.ops.hia.row_softmax_bwd.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend, device):
    assert_compiles(OP, row_softmax, make_inputs(9, 20, torch.float32, device, out_dtype=torch.bfloat16), backend)


def test_in_place_compiles_to_one_graph(device):
    inputs = make_inputs(9, 20, torch.float32, device)
    compiled = torch.compile(softmax_in_place, backend="aot_eager", fullgraph=True)
    arguments = inputs["scores"], inputs["scale"]
    for got, expected in zip(compiled(*arguments), softmax_in_place(*arguments), strict=True):
        assert torch.equal(got, expected)


def test_dynamic_sizes_compile_once(device):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(row_softmax, backend=counter, fullgraph=True, dynamic=True)
    for rows, columns in ((9, 20), (14, 6), (31, 30)):
        inputs = make_inputs(rows, columns, torch.float32, device)
        assert torch.equal(compiled(**inputs)[0], row_softmax(**inputs)[0])
    assert counter.frame_count == 1


def test_exports(device):
    def half_probabilities(scores, scale):  # export takes no dtype as an input
        return row_softmax(scores, scale, torch.float16)

    inputs = make_inputs(9, 20, torch.float32, device)
    inputs.pop("out_dtype")
    assert_exports(half_probabilities, inputs)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_changes_nothing(dtype, device):
    inputs = make_inputs(9, 20, torch.float32, device)
    with torch.autocast(device, dtype=dtype):
        got = forward_backward(OP, row_softmax, inputs)
        in_place = softmax_in_place(inputs["scores"], inputs["scale"])
    assert_identical(got, forward_backward(OP, row_softmax, inputs))
    assert in_place[0].dtype == in_place[1].dtype == torch.float32


def test_flops():
    """Count none: the counter counts products alone."""
    inputs = make_inputs(9, 20, torch.float32)
    scores, scale, _ = inputs.values()
    assert flops_by_op(lambda: row_softmax(**inputs)) == {"hia.row_softmax": 0}
    assert flops_by_op(lambda: softmax_in_place(scores, scale)) == {"hia.row_softmax_": 0}
    assert flops(row_softmax_ref, **inputs) == flops(row_softmax_inplace_ref, scores.clone(), scale) == 0
    assert flops(torch.ops.hia.row_softmax_bwd, scores, scores, scale) == 0
    assert flops(row_softmax_bwd_ref, scores, scores, scale) == 0


def test_two_runs_are_bit_identical(device):
    assert_repeatable(OP, row_softmax, make_inputs(200, 300, torch.float32, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_in_place_is_the_same_and_in_place(dtype, device):
    inputs = make_inputs(9, 20, dtype, device)
    wide = torch.full((9, 36), float("nan"), dtype=dtype, device=device)
    for scores in (inputs["scores"].clone(), inputs["scores"].T.contiguous().T, wide[:, 8:28].copy_(inputs["scores"])):
        version, (p, lse) = scores._version, row_softmax(scores, inputs["scale"])
        assert torch.equal(row_softmax_(scores, inputs["scale"]), lse) and torch.equal(scores, p)
        assert scores._version > version  # autograd notices if it had saved it
    assert wide[:, :8].isnan().all() and wide[:, 28:].isnan().all()


def test_autograd_notices_what_is_overwritten(monkeypatch):
    """Write as a kernel does, to an address: the version must rise all the same, of the raw op too."""

    def quiet(scores, scale):
        scores.detach().numpy()[:] = 0.0
        return scores.new_zeros(scores.shape[0])

    rows = [Backend("quiet", {"row_softmax_": quiet}), *BACKENDS.backends]
    monkeypatch.setattr(BACKENDS, "backends", rows)
    factor = torch.ones(2, 3, requires_grad=True)
    for function in (row_softmax_, torch.ops.hia.row_softmax_):
        scores = torch.ones(2, 3)
        version, product = scores._version, scores * factor  # which keeps the scores for factor's gradient
        function(scores, 1.0)
        assert scores._version > version and not scores.any()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()
        with torch.inference_mode():  # its tensors have no version
            function(torch.ones(2, 3), 1.0)


def test_rows_are_independent(device):
    inputs = make_inputs(12, 50, torch.float32, device)
    exact = row_softmax_ref(**analysed(inputs, torch.float32))[0]
    one_by_one = torch.cat([row_softmax(**{**inputs, "scores": row})[0] for row in inputs["scores"].split(1)])
    assert_close("p", one_by_one, exact, row_softmax(**inputs)[0], dtype=torch.float32)
    inputs["scores"][3, 7] = float("nan")
    p, lse = row_softmax(**inputs)
    expected = torch.arange(12, device=device) == 3
    assert torch.equal(p.isnan().any(1), expected) and torch.equal(lse.isnan(), expected)


def test_infinite_scores(device):
    """Treat -inf as an absent column; a row of nothing else is as in torch.softmax."""
    inputs = make_inputs(3, 50, torch.float32, device)
    scores = inputs["scores"]
    scores[0, 10:] = scores[1] = float("-inf")
    p, lse = row_softmax(**inputs)
    few = row_softmax(scores[:1, :10], inputs["scale"])
    assert torch.equal(p[0, :10], few[0][0]) and torch.equal(lse[:1], few[1]) and not p[0, 10:].any()
    assert p[1].isnan().all() and lse[1] == float("-inf") and p[2].isfinite().all()
    assert row_softmax(scores[:, :0], 1.0)[1].tolist() == [float("-inf")] * 3


ERRORS = [
    ({"scores": torch.ones(9)}, ValueError, r"scores must have shape \[R, N\], got \[9\]"),
    ({"scores": torch.ones(9, 4).int()}, TypeError, "scores must be float32 or float16 or .* got int32"),
    ({"scores": [[1.0]]}, TypeError, "scores must be a tensor, got list"),
    ({"out_dtype": torch.int32}, ValueError, r"out_dtype must be None or torch.float32 or .*, got torch.int32"),
    ({"out_dtype": torch.float64}, ValueError, r"out_dtype must be None or .*torch.bfloat16, got torch.float64"),
]


def test_error_messages():
    inputs = make_inputs(9, 4, torch.float32)
    for change, error, message in ERRORS:
        with pytest.raises(error, match=f"^hia::row_softmax: {message}"):
            row_softmax(**{**inputs, **change})
    with pytest.raises(TypeError, match=r"^hia::row_softmax_: scores must be float32 or .* got int32"):
        row_softmax_(torch.ones(9, 4).int(), 1.0)
    with pytest.raises(ValueError, match=r"^hia::row_softmax_: scores must have shape \[R, N\], got \[4\]"):
        row_softmax_(torch.ones(4), 1.0)
    trained = torch.ones(9, 4).requires_grad_()
    with pytest.raises(
        RuntimeError, match="^hia::row_softmax_: scores must not be part of a gradient graph, got .* use row_"
    ):
        row_softmax_(trained, 1.0)
    with torch.no_grad():
        row_softmax_(trained, 1.0)


def test_no_gradient_of_gradients():
    scores = torch.randn(3, 4).requires_grad_()
    (dscores,) = torch.autograd.grad(row_softmax(scores, 1.0)[0].square().sum(), scores, create_graph=True)
    with pytest.raises(NotImplementedError, match="hia::row_softmax: gradients of gradients are not implemented"):
        dscores.sum().backward()
