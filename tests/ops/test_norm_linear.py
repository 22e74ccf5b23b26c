"""``hia::norm_linear``."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from hia_kernels import norm_linear
from hia_kernels.ops.norm_linear.reference import norm_linear_bwd_ref, norm_linear_ref
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

OP = "norm_linear"
make_inputs = inputs_of(OP)
CASES = [
    pytest.param(33, None, {}, id="all-rows"),
    pytest.param(40, 60, {"bias": False}, id="rows-twice-no-bias"),
    pytest.param(9, 0, {}, id="no-rows"),
    pytest.param(1, 1, {"channels": 16, "dim": 16}, id="one-row"),
    pytest.param(37, 20, {"channels": 100, "dim": 70, "norm_dtype": torch.float32}, id="ragged-fp32-norm"),
    pytest.param(33, None, {"offset": 30.0}, id="mean-30-deviations"),
    pytest.param(1568, None, {"channels": 5120, "dim": 10240}, id="13b-features-two-images", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("tokens", "rows", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(tokens, rows, options, dtype, device):
    assert_matches(OP, norm_linear, norm_linear_ref, make_inputs(tokens, rows, dtype, device, **options), dtype)


def test_backward_is_autograd_of_reference(device):
    inputs = make_inputs(40, 60, torch.float64, device)
    assert_backward_is_autograd_of_reference(OP, norm_linear, norm_linear_ref, inputs)


def test_agrees_with_pytorch_modules(device):
    """Check the reference against PyTorch's modules."""
    inputs = make_inputs(12, 20, torch.float64, device)
    norm = torch.nn.LayerNorm(48, eps=inputs["eps"], device=device, dtype=torch.float64)
    linear = torch.nn.Linear(48, 32, device=device, dtype=torch.float64)
    norm.weight.data, norm.bias.data = inputs["norm_weight"], inputs["norm_bias"]
    linear.weight.data, linear.bias.data = inputs["weight"], inputs["bias"]
    expected = linear(norm(inputs["x"]))[inputs["row_idx"]].detach()
    assert_close("out", norm_linear(**inputs), expected, expected, dtype=torch.float64, slack=FP64_SLACK)


def test_gradcheck():
    assert_gradcheck(OP, norm_linear, make_inputs(4, 6, torch.float64, channels=5, dim=3))


def test_opcheck(device):
    inputs = make_inputs(9, 5, torch.float32, device, channels=16, dim=8)
    opcheck(OP, torch.ops.hia.norm_linear.default, inputs)
    x, norm_weight, norm_bias, weight, _, row_idx, eps = inputs.values()
    dout = torch.randn(8, 5, device=device).T
    arguments = (dout, x, norm_weight, norm_bias, weight, row_idx, eps)
    for mask in ([True] * 5, [False, False, True, False, True], [False, False, False, True, False]):
        torch.library.opcheck(torch.ops.hia.norm_linear_bwd.default, (*arguments, mask))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend, device):
    assert_compiles(OP, norm_linear, make_inputs(9, 5, torch.float32, device), backend)


def test_dynamic_tokens_compile_once(device):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(norm_linear, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (5, 9, 31):
        inputs = make_inputs(tokens, None, torch.float32, device)
        assert torch.equal(compiled(**inputs), norm_linear(**inputs))
    assert counter.frame_count == 1


def test_exports(device):
    assert_exports(norm_linear, make_inputs(9, 5, torch.float32, device))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype, device):
    inputs = make_inputs(9, 5, torch.float32, device)
    assert_autocast(OP, norm_linear, inputs, dtype, cast=("x", "weight", "bias"), out_dtype=dtype)


def test_a_norm_in_the_other_halves(device):
    """Run an fp16 model's norm beside bf16, as autocast leaves it: the bits of the same values in fp32."""
    norms = ("norm_weight", "norm_bias")
    for dtype, other in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        inputs = make_inputs(9, 5, dtype, device)
        inputs |= {name: inputs[name].to(other) for name in norms}
        got = forward_backward(OP, norm_linear, inputs)
        expected = forward_backward(OP, norm_linear, {**inputs, **{name: inputs[name].float() for name in norms}})
        assert_identical(got, expected | {f"d{name}": expected[f"d{name}"].to(other) for name in norms})


def test_flops():
    inputs = make_inputs(9, 5, torch.float32)
    forward = flops(norm_linear_ref, **inputs)
    assert forward == 2 * 5 * 48 * 32
    assert flops_by_op(lambda: norm_linear(**inputs)) == {"hia.norm_linear": forward}
    x, norm_weight, norm_bias, weight, _, row_idx, eps = inputs.values()
    arguments = (torch.randn(5, 32), x, norm_weight, norm_bias, weight, row_idx, eps)
    masks = {(True,) * 5: 2, (True, False, False, False, False): 1, (False, False, False, False, True): 0}
    for mask, products in masks.items():
        backward = flops(norm_linear_bwd_ref, *arguments, mask)
        assert backward == flops(torch.ops.hia.norm_linear_bwd, *arguments, mask) == products * forward


def test_two_runs_are_bit_identical(device):
    assert_repeatable(OP, norm_linear, make_inputs(40, 600, torch.float32, device))


def test_nan_in_rows_not_selected_does_not_leak(device):
    inputs = make_inputs(40, 12, torch.float32, device)
    dirty = inputs["x"].clone()
    untouched = torch.ones(40, dtype=torch.bool, device=device).index_fill(0, inputs["row_idx"], False)
    dirty[untouched] = float("nan")
    clean = forward_backward(OP, norm_linear, inputs)
    assert_identical(forward_backward(OP, norm_linear, {**inputs, "x": dirty}), clean)
    assert not clean["dx"][untouched].any()


def test_rows_are_independent(device):
    inputs = make_inputs(12, None, torch.float32, device)
    exact = norm_linear_ref(**analysed(inputs, torch.float32))
    together = norm_linear(**inputs)
    one_by_one = torch.cat([norm_linear(**{**inputs, "x": row}) for row in inputs["x"].split(1)])
    assert_close("out", one_by_one, exact, together, dtype=torch.float32)


def test_gathering_first_gives_the_same_bits(device):
    inputs = make_inputs(40, 12, torch.float32, device)
    gathered = {**inputs, "x": inputs["x"][inputs["row_idx"]], "row_idx": None}
    assert torch.equal(norm_linear(**inputs), norm_linear(**gathered))


def test_column_major_input(device):
    inputs = make_inputs(9, None, torch.float32, device)
    inputs["x"] = inputs["x"].T.contiguous().T
    assert not inputs["x"].is_contiguous()
    opcheck(OP, torch.ops.hia.norm_linear.default, inputs)
    assert_matches(OP, norm_linear, norm_linear_ref, inputs, torch.float32)


ERRORS = [
    ({"x": torch.ones(2, 48, 1)}, ValueError, r"x must have shape \[T, C\], got \[2, 48, 1\]"),
    ({"x": torch.ones(9, 48, dtype=torch.int32)}, TypeError, "x must be float32 or float16 or .* got int32"),
    ({"norm_weight": torch.ones(47)}, ValueError, r"norm_weight must have shape \[C\], got \[47\]; C=48 is fixed by x"),
    ({"norm_bias": torch.ones(48).half()}, TypeError, "norm_bias must be float32 beside x in float32, got float16"),
    (
        {"weight": torch.ones(32, 47)},
        ValueError,
        r"weight must have shape \[D, C\], got \[32, 47\]; C=48 is fixed by x",
    ),
    ({"weight": torch.ones(32, 48).half()}, TypeError, "weight must be float32 like x, got float16"),
    ({"bias": torch.ones(31)}, ValueError, r"bias must have shape \[D\], got \[31\]; D=32 is fixed by weight"),
    ({"bias": torch.ones(32).double()}, TypeError, "bias must be float32 like x, got float64"),
    ({"row_idx": torch.ones(3, dtype=torch.bool)}, TypeError, "row_idx must be int32 or int64, got bool"),
    ({"row_idx": torch.ones(3, 1, dtype=torch.int64)}, ValueError, r"row_idx must have shape \[R\], got \[3, 1\]"),
    ({"row_idx": torch.tensor([0, 9])}, ValueError, r"row_idx must be in \[0, 9\), got values from 0 to 9"),
    ({"row_idx": torch.tensor([-1, 3])}, ValueError, r"row_idx must be in \[0, 9\), got values from -1 to 3"),
    ({"weight": torch.ones(32, 48, device="meta")}, ValueError, "weight must be on cpu like x, got meta"),
]


def test_error_messages():
    inputs = make_inputs(9, 5, torch.float32)
    for change, error, message in ERRORS:
        with pytest.raises(error, match=f"^hia::norm_linear: {message}"):
            norm_linear(**{**inputs, **change})


def test_row_values_are_checked_in_compiled_code():
    compiled = torch.compile(norm_linear, backend="aot_eager", fullgraph=True)
    inputs = make_inputs(9, 5, torch.float32)
    compiled(**inputs)
    with pytest.raises(ValueError, match=r"row_idx must be in \[0, 9\), got values from 0 to 9"):
        compiled(**{**inputs, "row_idx": torch.tensor([0, 1, 2, 3, 9])})


def test_no_gradient_of_gradients():
    inputs = make_inputs(9, None, torch.float32)
    x = inputs["x"].detach().requires_grad_()
    (dx,) = torch.autograd.grad(norm_linear(**{**inputs, "x": x}).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="hia::norm_linear: gradients of gradients are not implemented"):
        dx.sum().backward()
