"""Triton kernels of ``hia::condition_queries``, in the interpreter or on a GPU."""

import pytest
import torch

from hia_kernels import condition_queries, last_backend, use_backend
from hia_kernels.ops.condition_queries.reference import condition_queries_ref
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
from tests.ops.interpreter import products_in_order  # noqa: F401

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
pytestmark = pytest.mark.interpreter

OP = "condition_queries"
make_inputs = inputs_of(OP)
CASES = [
    pytest.param(40, 3, {}, id="three-samples"),
    pytest.param(4, 9, {"bias": False}, id="rows-twice-no-bias"),
    pytest.param(9, 0, {}, id="no-samples"),
    pytest.param(1, 1, {"channels": 16, "queries": 1, "dim": 16}, id="one-token-one-query"),
    pytest.param(37, 5, {"channels": 300, "queries": 70, "dim": 150}, id="ragged"),
    pytest.param(30, 37, {"queries": 3}, id="more-samples-than-a-tile"),
    pytest.param(9, 2, {"queries": 0}, id="no-queries"),
]


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


@pytest.mark.parametrize(("tokens", "samples", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(tokens, samples, options, dtype, triton_device):
    inputs = make_inputs(tokens, samples, dtype, triton_device, **options)
    assert_matches(OP, condition_queries, condition_queries_ref, inputs, dtype)
    assert last_backend(OP) == "triton"


def test_partial_gradients(triton_device):
    inputs = make_inputs(9, 3, torch.float32, triton_device)
    hidden, row_idx, weight, _, _ = inputs.values()
    arguments = (torch.randn(32, 5, 3, device=triton_device).permute(2, 1, 0), hidden, row_idx, weight)
    complete = torch.ops.hia.condition_queries_bwd(*arguments, [True] * 4)
    for position in range(4):
        mask = [position == other for other in range(4)]
        assert torch.equal(torch.ops.hia.condition_queries_bwd(*arguments, mask)[position], complete[position])
        torch.library.opcheck(torch.ops.hia.condition_queries_bwd.default, (*arguments, mask))


def test_opcheck_and_strides(triton_device):
    inputs = make_inputs(9, 3, torch.float32, triton_device, channels=16, dim=8)
    opcheck(OP, torch.ops.hia.condition_queries.default, inputs)
    for name in ("hidden", "weight", "queries"):
        inputs[name] = inputs[name].T.contiguous().T
    assert_matches(OP, condition_queries, condition_queries_ref, inputs, torch.float32)


def test_nan_beyond_what_is_named_does_not_leak(triton_device):
    inputs = make_inputs(40, 3, torch.float32, triton_device)
    untouched = torch.ones(40, dtype=torch.bool, device=triton_device).index_fill(0, inputs["row_idx"], False)
    hidden = torch.full((42, 80), float("nan"), device=triton_device)[1:-1, 8:56].copy_(inputs["hidden"])
    hidden[untouched] = float("nan")
    weight = torch.full((34, 80), float("nan"), device=triton_device)[1:-1, 8:56].copy_(inputs["weight"])
    queries = torch.full((7, 80), float("nan"), device=triton_device)[1:-1, 8:40].copy_(inputs["queries"])
    clean = forward_backward(OP, condition_queries, inputs)
    dirty = {**inputs, "hidden": hidden, "weight": weight, "queries": queries}
    assert_identical(forward_backward(OP, condition_queries, dirty), clean)
    assert not clean["dhidden"][untouched].any()


def test_two_runs_are_bit_identical(triton_device):
    assert_repeatable(OP, condition_queries, make_inputs(4, 30, torch.float32, triton_device))


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_together_are_one_at_a_time_bit_for_bit(dtype, triton_device):
    """Take more samples than a tile holds; backward sums over samples in their order, which fp32 shows."""
    inputs = make_inputs(40, 37, dtype, triton_device)
    together = condition_queries(**inputs)
    rows = inputs["row_idx"].split(1)
    one_by_one = [condition_queries(**{**inputs, "row_idx": row}) for row in rows]
    assert torch.equal(torch.cat(one_by_one), together)
    if dtype != torch.float32:
        return
    dout = torch.randn(together.shape, device=triton_device)
    arguments, only_queries = (inputs["hidden"], inputs["row_idx"], inputs["weight"]), [False, False, False, True]
    dqueries = torch.ops.hia.condition_queries_bwd(dout, *arguments, only_queries)[3]
    expected = torch.zeros_like(dqueries)
    for b, row in enumerate(rows):
        alone = (dout[b : b + 1], inputs["hidden"], row, inputs["weight"])
        expected += torch.ops.hia.condition_queries_bwd(*alone, only_queries)[3]
    assert torch.equal(dqueries, expected)
    assert last_backend(OP) == "triton"


def test_rows_put_back_together_are_one_at_a_time_bit_for_bit(triton_device):
    """Check dhidden after the product, which is cuBLAS's and holds to rounding; a row named twice is a sum in order."""
    from hia_kernels.ops.condition_queries import triton_bwd

    inputs = make_inputs(6, 20, torch.float32, triton_device)
    drows = torch.randn(20, 48, device=triton_device)
    together = triton_bwd._dhidden(drows, inputs["row_idx"], inputs["hidden"])
    expected = torch.zeros_like(together)
    for b in range(20):
        one = slice(b, b + 1)
        expected += triton_bwd._dhidden(drows[one], inputs["row_idx"][one], inputs["hidden"])
    assert torch.equal(together, expected) and together.any()


def test_zero_weight_gives_the_queries_themselves(triton_device):
    inputs = make_inputs(40, 3, torch.bfloat16, triton_device, bias=False)
    inputs["weight"] = torch.zeros_like(inputs["weight"])
    assert torch.equal(condition_queries(**inputs), inputs["queries"].expand(3, -1, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, triton_device):
    inputs = make_inputs(9, 3, torch.float32, triton_device)
    cast = ("hidden", "weight", "bias", "queries")
    assert_autocast(OP, condition_queries, inputs, dtype, cast=cast, out_dtype=dtype)
