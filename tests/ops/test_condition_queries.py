"""``hia::condition_queries``."""

import pytest
import torch

from hia_kernels import condition_queries
from hia_kernels.ops.condition_queries.reference import condition_queries_bwd_ref, condition_queries_ref
from hia_kernels.testing import FP64_SLACK, analysed, assert_close
from tests.inputs import inputs_of
from tests.ops.harness import (
    DTYPES,
    HALVES,
    assert_autocast,
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

OP = "condition_queries"
make_inputs = inputs_of(OP)
CASES = [
    pytest.param(40, 3, {}, id="three-samples"),
    pytest.param(4, 9, {"bias": False}, id="rows-twice-no-bias"),
    pytest.param(9, 0, {}, id="no-samples"),
    pytest.param(1, 1, {"channels": 16, "queries": 1, "dim": 16}, id="one-token-one-query"),
    pytest.param(37, 5, {"channels": 100, "queries": 33, "dim": 70}, id="ragged"),
    pytest.param(9, 2, {"queries": 0}, id="no-queries"),
    pytest.param(2424, 2, {"channels": 5120, "queries": 256, "dim": 5120}, id="13b-two-samples", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("tokens", "samples", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(tokens, samples, options, dtype, device):
    inputs = make_inputs(tokens, samples, dtype, device, **options)
    in_sequence = {"out": inputs["hidden"].shape[1]}
    assert_matches(OP, condition_queries, condition_queries_ref, inputs, dtype, in_sequence)


def test_backward_is_autograd_of_reference(device):
    inputs = make_inputs(4, 9, torch.float64, device)
    assert_backward_is_autograd_of_reference(OP, condition_queries, condition_queries_ref, inputs)


def test_agrees_with_a_loop(device):
    """Check the reference against Eq. 2, sample by sample and query by query."""
    inputs = make_inputs(12, 3, torch.float64, device)
    linear = torch.nn.Linear(48, 32, device=device, dtype=torch.float64)
    linear.weight.data, linear.bias.data = inputs["weight"], inputs["bias"]
    rows = [inputs["hidden"][row] for row in inputs["row_idx"].tolist()]
    expected = torch.stack([torch.stack([query + linear(h) for query in inputs["queries"]]) for h in rows]).detach()
    assert_close("out", condition_queries(**inputs), expected, expected, dtype=torch.float64, slack=FP64_SLACK)


def test_gradcheck():
    inputs = make_inputs(3, 4, torch.float64, channels=4, queries=2, dim=3)
    assert_gradcheck(OP, condition_queries, inputs)


def test_opcheck(device):
    inputs = make_inputs(9, 3, torch.float32, device, channels=16, dim=8)
    opcheck(OP, torch.ops.hia.condition_queries.default, inputs)
    column_major = {**inputs, "queries": inputs["queries"].T.contiguous().T}
    opcheck(OP, torch.ops.hia.condition_queries.default, column_major)
    hidden, row_idx, weight, _, _ = inputs.values()
    dout = torch.randn(8, 5, 3, device=device).permute(2, 1, 0)
    for mask in ([True] * 4, [False, False, True, True], [True, False, False, False]):
        torch.library.opcheck(torch.ops.hia.condition_queries_bwd.default, (dout, hidden, row_idx, weight, mask))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend, device):
    assert_compiles(OP, condition_queries, make_inputs(9, 3, torch.float32, device), backend)


def test_exports(device):
    assert_exports(condition_queries, make_inputs(9, 3, torch.float32, device))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype, device):
    inputs = make_inputs(9, 3, torch.float32, device)
    cast = ("hidden", "weight", "bias", "queries")
    assert_autocast(OP, condition_queries, inputs, dtype, cast=cast, out_dtype=dtype)


def test_flops():
    inputs = make_inputs(9, 3, torch.float32)
    forward = flops(condition_queries_ref, **inputs)
    assert forward == 2 * 3 * 48 * 32
    assert flops_by_op(lambda: condition_queries(**inputs)) == {"hia.condition_queries": forward}
    hidden, row_idx, weight, _, _ = inputs.values()
    arguments = (torch.randn(3, 5, 32), hidden, row_idx, weight)
    for mask, products in (([True] * 4, 2), ([False, True, False, False], 1), ([False, False, True, True], 0)):
        backward = flops(condition_queries_bwd_ref, *arguments, mask)
        assert backward == flops(torch.ops.hia.condition_queries_bwd, *arguments, mask) == products * forward


def test_two_runs_are_bit_identical(device):
    assert_repeatable(OP, condition_queries, make_inputs(4, 300, torch.float32, device))


def test_nan_in_rows_not_selected_does_not_leak(device):
    inputs = make_inputs(40, 3, torch.float32, device)
    untouched = torch.ones(40, dtype=torch.bool, device=device).index_fill(0, inputs["row_idx"], False)
    dirty = inputs["hidden"].clone()
    dirty[untouched] = float("nan")
    clean = forward_backward(OP, condition_queries, inputs)
    assert_identical(forward_backward(OP, condition_queries, {**inputs, "hidden": dirty}), clean)
    assert not clean["dhidden"][untouched].any()


def test_samples_are_independent(device):
    inputs = make_inputs(40, 6, torch.float32, device)
    exact = condition_queries_ref(**analysed(inputs, torch.float32))
    together = condition_queries(**inputs)
    one_by_one = [condition_queries(**{**inputs, "row_idx": row}) for row in inputs["row_idx"].split(1)]
    assert_close("out", torch.cat(one_by_one), exact, together, dtype=torch.float32)


def test_zero_weight_gives_the_queries_themselves(device):
    inputs = make_inputs(40, 3, torch.float32, device, bias=False)
    inputs["weight"] = torch.zeros_like(inputs["weight"])
    assert torch.equal(condition_queries(**inputs), inputs["queries"].expand(3, -1, -1))


ERRORS = [
    ({"hidden": torch.ones(48)}, ValueError, r"hidden must have shape \[T, C\], got \[48\]"),
    ({"hidden": torch.ones(9, 48).long()}, TypeError, "hidden must be float32 or float16 or .* got int64"),
    ({"row_idx": torch.tensor(3)}, ValueError, r"row_idx must have shape \[B\], got \[\]"),
    ({"row_idx": torch.tensor([3]).byte()}, TypeError, "row_idx must be int32 or int64, got uint8"),
    ({"row_idx": torch.tensor([3, 9])}, ValueError, r"row_idx must be in \[0, 9\), got values from 3 to 9"),
    ({"row_idx": torch.tensor([3, -1])}, ValueError, r"row_idx must be in \[0, 9\), got values from -1 to 3"),
    (
        {"weight": torch.ones(32, 47)},
        ValueError,
        r"weight must have shape \[D, C\], got \[32, 47\]; C=48 is fixed by h",
    ),
    ({"weight": torch.ones(32, 48).half()}, TypeError, "weight must be float32 like hidden, got float16"),
    ({"bias": torch.ones(31)}, ValueError, r"bias must have shape \[D\], got \[31\]; D=32 is fixed by weight"),
    ({"bias": torch.ones(32).half()}, TypeError, "bias must be float32 like hidden, got float16"),
    (
        {"queries": torch.ones(5, 31)},
        ValueError,
        r"queries must have shape \[M, D\], got \[5, 31\]; D=32 is fixed by w",
    ),
    ({"queries": torch.ones(5, 32).half()}, TypeError, "queries must be float32 like hidden, got float16"),
    ({"queries": torch.ones(5, 32, device="meta")}, ValueError, "queries must be on cpu like hidden, got meta"),
]


def test_error_messages():
    inputs = make_inputs(9, 3, torch.float32)
    for change, error, message in ERRORS:
        with pytest.raises(error, match=f"^hia::condition_queries: {message}"):
            condition_queries(**{**inputs, **change})


def test_row_values_are_checked_in_compiled_code():
    compiled = torch.compile(condition_queries, backend="aot_eager", fullgraph=True)
    inputs = make_inputs(9, 3, torch.float32)
    compiled(**inputs)
    with pytest.raises(ValueError, match=r"row_idx must be in \[0, 9\), got values from 0 to 9"):
        compiled(**{**inputs, "row_idx": torch.tensor([0, 1, 9])})


def test_no_gradient_of_gradients():
    inputs = make_inputs(9, 3, torch.float32)
    weight = inputs["weight"].detach().requires_grad_()
    out = condition_queries(**{**inputs, "weight": weight})
    (dweight,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="hia::condition_queries: gradients of gradients are not implemented"):
        dweight.sum().backward()
