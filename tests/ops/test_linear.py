"""``hia::linear``."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from hia_kernels import last_backend, linear, use_backend
from hia_kernels.core import products
from hia_kernels.ops.linear.reference import linear_bwd_ref, linear_ref
from hia_kernels.testing import FP64_SLACK, analysed, assert_close, dout_like
from tests.inputs import inputs_of
from tests.ops.harness import (
    HALVES,
    assert_autocast,
    assert_backward_is_autograd_of_reference,
    assert_compiles,
    assert_exports,
    assert_gradcheck,
    assert_matches,
    assert_repeatable,
    flops,
    flops_by_op,
    forward_backward,
    opcheck,
    product_row,
    skip_unless_here,
    with_dtypes,
)

OP = "linear"
make_inputs = inputs_of(OP)
LARGE = {"channels": 300, "dim": 257}  # of 300 rows and more: beyond products.MIN_FLOPS, like one-column's below
CASES = [
    pytest.param(33, {}, id="bias"),
    pytest.param(40, {"bias": False}, id="no-bias"),
    pytest.param(0, {}, id="no-rows"),
    pytest.param(1, {"channels": 1, "dim": 1}, id="one-number"),
    pytest.param(37, {"channels": 100, "dim": 70}, id="ragged"),
    pytest.param(300, LARGE, id="large"),
    pytest.param(300, {**LARGE, "bias": False}, id="large-no-bias"),
    pytest.param(1, {"channels": 1099, "dim": 1100}, id="one-row"),
    pytest.param(1100, {"channels": 1099, "dim": 1}, id="one-column"),
    pytest.param(1568, {"channels": 5120, "dim": 5120}, id="13b-features-two-images", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("rows", "options", "dtype"), with_dtypes(CASES, ("bias", "no-bias", "no-rows", "ragged")))
def test_matches_reference(rows, options, dtype, device, monkeypatch):
    monkeypatch.setattr(products, "MIN_FLOPS", 2**21)
    assert_matches(OP, linear, linear_ref, make_inputs(rows, dtype, device, **options), dtype)


@pytest.mark.parametrize("backend", ["auto", "native", "cpu", "reference"])
def test_backend_used(backend):
    skip_unless_here(backend)
    inputs = make_inputs(300, torch.float32, **LARGE)
    with use_backend(backend):
        assert_matches(OP, linear, linear_ref, inputs, torch.float32)
    assert last_backend(OP) == (product_row() if backend == "auto" else backend)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
def test_other_dtypes_are_left_to_the_reference(dtype):
    inputs = make_inputs(9, dtype)
    linear(**inputs)
    assert last_backend(OP) == "reference"
    reason = f"cpu: {str(dtype).removeprefix('torch.')} is left to the reference"
    with use_backend("cpu"), pytest.raises(NotImplementedError, match=reason):
        linear(**inputs)


def test_cublas_is_not_for_the_cpu():
    with (
        use_backend("cublas"),
        pytest.raises(NotImplementedError, match="cublas: (no|tensors must be on a) CUDA device"),
    ):
        linear(**make_inputs(9, torch.float32))


def test_forcing_triton_leaves_it_to_auto():
    with use_backend("triton"):
        linear(**make_inputs(9, torch.float32))
    assert last_backend(OP) == "cpu"


def test_backward_is_autograd_of_reference(device):
    assert_backward_is_autograd_of_reference(OP, linear, linear_ref, make_inputs(40, torch.float64, device))


def test_agrees_with_the_product(device):
    """Check the reference against the matrix product."""
    inputs = make_inputs(12, torch.float64, device)
    expected = (inputs["x"][:, None] * inputs["weight"]).sum(-1) + inputs["bias"]
    assert_close("out", linear(**inputs), expected, expected, dtype=torch.float64, slack=FP64_SLACK)


def test_gradcheck():
    assert_gradcheck(OP, linear, make_inputs(4, torch.float64, channels=5, dim=3))


@pytest.mark.parametrize("options", [{"channels": 16, "dim": 8}, {**LARGE, "bias": False}], ids=["small", "large"])
def test_opcheck(options, device):
    inputs = make_inputs(300, torch.float32, device, **options)
    terms = max(float(inputs[name].abs().sum(0).max()) for name in ("x", "weight"))  # of gradients: dout is ones
    opcheck(OP, torch.ops.hia.linear.default, inputs, terms)
    dout = torch.randn(options["dim"], 300, device=device).T
    for mask in ([True, True, True], [False, True, False], [True, False, True]):
        torch.library.opcheck(torch.ops.hia.linear_bwd.default, (dout, inputs["x"], inputs["weight"], mask))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend, device):
    assert_compiles(OP, linear, make_inputs(9, torch.float32, device), backend)


def test_dynamic_rows_compile_once(device):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(linear, backend=counter, fullgraph=True, dynamic=True)
    for rows in (5, 9, 600):
        inputs = make_inputs(rows, torch.float32, device, **LARGE)
        assert torch.equal(compiled(**inputs), linear(**inputs))
    assert counter.frame_count == 1


def test_exports(device):
    assert_exports(linear, make_inputs(9, torch.float32, device))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype, device):
    inputs = make_inputs(9, torch.float32, device)
    assert_autocast(OP, linear, inputs, dtype, cast=("x", "weight", "bias"), out_dtype=dtype)


def test_flops():
    inputs = make_inputs(9, torch.float32)
    forward = flops(linear_ref, **inputs)
    assert forward == 2 * 9 * 48 * 32
    assert flops_by_op(lambda: linear(**inputs)) == {"hia.linear": forward}
    arguments = (torch.randn(9, 32), inputs["x"], inputs["weight"])
    for mask, count in {(True,) * 3: 2, (True, False, False): 1, (False, False, True): 0}.items():
        backward = flops(linear_bwd_ref, *arguments, mask)
        assert backward == flops(torch.ops.hia.linear_bwd, *arguments, mask) == count * forward


def test_two_runs_are_bit_identical(device):
    assert_repeatable(OP, linear, make_inputs(600, torch.float32, device, **LARGE))


def test_rows_are_independent(device):
    """Compare to rounding: the products are the vendor's."""
    inputs = make_inputs(400, torch.float32, device, **LARGE)
    together = linear(**inputs)
    apart = torch.cat([linear(**{**inputs, "x": rows}) for rows in inputs["x"].split(130)])
    exact = linear_ref(**analysed(inputs, torch.float32))
    assert_close("out", apart, exact, together, dtype=torch.float32)


def test_nan_stays_in_its_row(device):
    inputs = make_inputs(300, torch.float32, device, **LARGE)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][7] = float("nan")
    assert linear(**inputs).isnan().any(1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("rows", [9, 300])
def test_any_strides(rows, device):
    """Take x and weight row-major, column-major, with steps between elements, and with repeated rows."""
    views = {
        "columns": lambda x: x.T.contiguous().T,
        "steps": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "same-rows": lambda x: x[:1].expand(x.shape[0], -1),
        "wide": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    }
    for name in ("x", "weight"):
        for view in views.values():
            inputs = make_inputs(rows, torch.float32, device, **LARGE)
            inputs[name] = view(inputs[name])
            assert not inputs[name].is_contiguous()
            assert_matches(OP, linear, linear_ref, inputs, torch.float32)


def test_only_gradients_that_are_wanted():
    inputs = make_inputs(300, torch.float32, **LARGE)
    every = forward_backward(OP, linear, inputs)
    for name in ("x", "weight", "bias"):
        leaf = inputs[name].detach().requires_grad_()
        out = linear(**{**inputs, name: leaf})
        (grad,) = torch.autograd.grad(out, leaf, dout_like(out, 0))
        assert torch.equal(grad, every[f"d{name}"])


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 700), channels=st.integers(1, 700), dim=st.integers(1, 700), bias=st.booleans())
def test_any_sizes(rows, channels, dim, bias):
    inputs = make_inputs(rows, torch.float32, channels=channels, dim=dim, bias=bias)
    assert_matches(OP, linear, linear_ref, inputs, torch.float32)


def test_sizes_on_both_sides_of_the_threshold():
    for rows, is_large in ((217, False), (218, True)):
        assert (2 * rows * 300 * 257 >= products.MIN_FLOPS) is is_large
        assert_matches(OP, linear, linear_ref, make_inputs(rows, torch.float32, **LARGE), torch.float32)


ERRORS = [
    ({"x": torch.ones(2, 48, 1)}, ValueError, r"x must have shape \[R, C\], got \[2, 48, 1\]"),
    ({"x": torch.ones(9, 48, dtype=torch.int32)}, TypeError, "x must be float32 or float16 or .* got int32"),
    (
        {"weight": torch.ones(32, 47)},
        ValueError,
        r"weight must have shape \[D, C\], got \[32, 47\]; C=48 is fixed by x",
    ),
    ({"weight": torch.ones(32, 48).half()}, TypeError, "weight must be float32 like x, got float16"),
    ({"bias": torch.ones(31)}, ValueError, r"bias must have shape \[D\], got \[31\]; D=32 is fixed by weight"),
    ({"bias": torch.ones(32).double()}, TypeError, "bias must be float32 like x, got float64"),
    ({"weight": torch.ones(32, 48, device="meta")}, ValueError, "weight must be on cpu like x, got meta"),
]


def test_error_messages():
    inputs = make_inputs(9, torch.float32)
    for change, error, message in ERRORS:
        with pytest.raises(error, match=f"^hia::linear: {message}"):
            linear(**{**inputs, **change})


def test_no_gradient_of_gradients():
    inputs = make_inputs(9, torch.float32)
    x = inputs["x"].detach().requires_grad_()
    (dx,) = torch.autograd.grad(linear(**{**inputs, "x": x}).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="hia::linear: gradients of gradients are not implemented"):
        dx.sum().backward()
