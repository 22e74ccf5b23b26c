"""``hia::head_linear``."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from hia_kernels import head_linear, last_backend, use_backend
from hia_kernels.ops.head_linear import batched
from hia_kernels.ops.head_linear.reference import head_linear_bwd_ref, head_linear_ref
from hia_kernels.testing import FP64_SLACK, assert_close, bounded, dout_like
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

OP = "head_linear"
make_inputs = inputs_of(OP)
LARGE = {"channels": 300, "dim": 257, "heads": 2}  # of 300 rows and more: beyond products.MIN_FLOPS
CASES = [
    pytest.param(2, 9, {}, id="two-images"),
    pytest.param(1, 9, {"merge_heads": True}, id="merged"),
    pytest.param(3, 5, {"merge_heads": True, "heads": 1}, id="one-head"),
    pytest.param(0, 9, {}, id="no-image"),
    pytest.param(0, 9, {"merge_heads": True}, id="no-image-merged"),
    pytest.param(2, 0, {"merge_heads": True}, id="no-rows"),
    pytest.param(1, 1, {"channels": 1, "dim": 1, "heads": 1}, id="one-number"),
    pytest.param(2, 37, {"channels": 100, "dim": 70}, id="ragged"),
    pytest.param(2, 300, LARGE, id="large"),
    pytest.param(2, 300, {**LARGE, "merge_heads": True}, id="large-merged"),
    pytest.param(1, 256, {"heads": 8, "channels": 640, "dim": 5120}, id="13b-queries", marks=pytest.mark.gpu),
    pytest.param(
        2, 256, {"heads": 8, "channels": 5120, "dim": 640, "merge_heads": True}, id="13b-results", marks=pytest.mark.gpu
    ),
]


@pytest.mark.parametrize(
    ("images", "rows", "options", "dtype"), with_dtypes(CASES, ("two-images", "no-image", "ragged", "large-merged"))
)
def test_matches_reference(images, rows, options, dtype, device):
    assert_matches(OP, head_linear, head_linear_ref, make_inputs(images, rows, dtype, device, **options), dtype)


@pytest.mark.parametrize("backend", ["auto", "native", "cpu", "reference"])
def test_backend_used(backend):
    skip_unless_here(backend)
    inputs = make_inputs(2, 300, torch.float32, **LARGE)
    with use_backend(backend):
        assert_matches(OP, head_linear, head_linear_ref, inputs, torch.float32)
    assert last_backend(OP) == (product_row() if backend == "auto" else backend)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
def test_other_dtypes_are_left_to_the_reference(dtype):
    inputs = make_inputs(2, 9, dtype)
    head_linear(**inputs)
    assert last_backend(OP) == "reference"
    reason = f"cpu: {str(dtype).removeprefix('torch.')} is left to the reference"
    with use_backend("cpu"), pytest.raises(NotImplementedError, match=reason):
        head_linear(**inputs)


@pytest.mark.parametrize("merge_heads", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_which_products_are_large(transposed, merge_heads):
    """Compute the gradient of a transposed weight transposed: its rows are the input's channels."""
    skip_unless_here("native")
    inputs = make_inputs(1, 4000, torch.float32, channels=300, dim=20, heads=2, merge_heads=merge_heads)
    inputs["x"] = inputs["x"].contiguous()
    if transposed:
        inputs["weight"] = inputs["weight"].mT.contiguous().mT
    out = head_linear(**inputs)
    assert last_backend(OP) == "native"
    for mask, expected in (([True, False], "native"), ([False, True], "native" if transposed else "cpu")):
        torch.ops.hia.head_linear_bwd(torch.randn_like(out), *inputs.values(), mask)
        assert last_backend(OP) == expected


def test_cublas_is_not_for_the_cpu():
    with (
        use_backend("cublas"),
        pytest.raises(NotImplementedError, match="cublas: (no|tensors must be on a) CUDA device"),
    ):
        head_linear(**make_inputs(2, 9, torch.float32))


def test_forcing_triton_leaves_it_to_auto():
    with use_backend("triton"):
        head_linear(**make_inputs(2, 9, torch.float32))
    assert last_backend(OP) == "cpu"


@pytest.mark.parametrize(
    ("images", "merge_heads", "transposed", "dtype"),
    [
        (3, False, False, torch.float64),
        (3, False, True, torch.float64),
        (3, True, False, torch.float64),
        (3, True, True, torch.float64),
        (0, True, False, torch.float64),
        (1, False, True, torch.float64),
        (3, False, False, torch.bfloat16),
        (1, True, True, torch.bfloat16),
    ],
)
def test_batched_products_match_the_reference(images, merge_heads, transposed, dtype):
    """Run CUDA's products on the CPU, where nothing picks them."""
    inputs = make_inputs(images, 9, dtype, merge_heads=merge_heads)
    x, weight = inputs["x"], inputs["weight"]
    if transposed:
        weight = weight.mT.contiguous().mT
    exact = head_linear_ref(bounded(x, dtype), bounded(weight, dtype), merge_heads)
    out = batched.head_linear_batched(x, weight, merge_heads)
    assert out.is_contiguous()
    slack = FP64_SLACK if dtype == torch.float64 else 1
    assert_close("out", out, exact, head_linear_ref(x, weight, merge_heads), dtype=dtype, slack=slack)
    dout = dout_like(out, 0)
    got = batched.head_linear_bwd_batched(dout, x, weight, merge_heads, [True, True])
    plain = head_linear_bwd_ref(dout, x, weight, merge_heads, [True, True])
    truth = head_linear_bwd_ref(*(bounded(t, dtype) for t in (dout, x, weight)), merge_heads, [True, True])
    assert got[1].stride() == weight.stride()
    for name, mine, right, usual in zip(("dx", "dweight"), got, truth, plain, strict=True):
        assert_close(name, mine, right, usual, dtype=dtype, slack=slack)


@pytest.mark.parametrize("merge_heads", [False, True])
def test_backward_is_autograd_of_reference(merge_heads, device):
    inputs = make_inputs(2, 40, torch.float64, device, merge_heads=merge_heads)
    assert_backward_is_autograd_of_reference(OP, head_linear, head_linear_ref, inputs)


@pytest.mark.parametrize("merge_heads", [False, True])
def test_agrees_with_einsum(merge_heads, device):
    """Check the reference against einsum."""
    inputs = make_inputs(2, 12, torch.float64, device, merge_heads=merge_heads)
    expected = torch.einsum("nhrc,hdc->nrhd" if merge_heads else "nhrc,hdc->nhrd", inputs["x"], inputs["weight"])
    expected = expected.flatten(2) if merge_heads else expected
    assert_close("out", head_linear(**inputs), expected, expected, dtype=torch.float64, slack=FP64_SLACK)


@pytest.mark.parametrize("merge_heads", [False, True])
def test_gradcheck(merge_heads):
    inputs = make_inputs(2, 3, torch.float64, heads=2, channels=4, dim=3, merge_heads=merge_heads)
    assert_gradcheck(OP, head_linear, inputs)


@pytest.mark.parametrize("options", [{"merge_heads": True}, LARGE], ids=["small", "large"])
def test_opcheck(options, device):
    inputs = make_inputs(2, 300, torch.float32, device, **options)
    opcheck(OP, torch.ops.hia.head_linear.default, inputs)
    merge, transposed = inputs["merge_heads"], inputs["weight"].mT.contiguous().mT
    dout = torch.randn(head_linear(**inputs).shape, device=device)
    for weight in (inputs["weight"], transposed):
        for mask in ([True, True], [False, True], [True, False]):
            arguments = (dout, inputs["x"], weight, merge, mask)
            torch.library.opcheck(torch.ops.hia.head_linear_bwd.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend, device):
    assert_compiles(OP, head_linear, make_inputs(2, 9, torch.float32, device, merge_heads=True), backend)


def test_dynamic_rows_compile_once(device):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(head_linear, backend=counter, fullgraph=True, dynamic=True)
    for rows in (5, 9, 600):
        inputs = make_inputs(2, rows, torch.float32, device, **LARGE)
        assert torch.equal(compiled(**inputs), head_linear(**inputs))
    assert counter.frame_count == 1


def test_exports(device):
    assert_exports(head_linear, make_inputs(2, 9, torch.float32, device))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype, device):
    inputs = make_inputs(2, 9, torch.float32, device)
    assert_autocast(OP, head_linear, inputs, dtype, cast=("x", "weight"), out_dtype=dtype)


def test_flops():
    inputs = make_inputs(2, 9, torch.float32)
    forward = flops(head_linear_ref, **inputs)
    assert forward == 2 * 2 * 9 * 3 * 48 * 32
    assert flops_by_op(lambda: head_linear(**inputs)) == {"hia.head_linear": forward}
    arguments = (torch.randn(2, 3, 9, 32), inputs["x"], inputs["weight"], False)
    for mask, count in {(True, True): 2, (True, False): 1, (False, True): 1}.items():
        backward = flops(head_linear_bwd_ref, *arguments, mask)
        assert backward == flops(torch.ops.hia.head_linear_bwd, *arguments, mask) == count * forward


@pytest.mark.parametrize("merge_heads", [False, True])
def test_two_runs_are_bit_identical(merge_heads, device):
    inputs = make_inputs(2, 600, torch.float32, device, **LARGE, merge_heads=merge_heads)
    assert_repeatable(OP, head_linear, inputs)


def test_images_are_independent():
    """Compare bit for bit on the CPU, where each image has products of its own."""
    inputs = make_inputs(3, 300, torch.float32, **LARGE)
    together = head_linear(**inputs)
    for image in range(3):
        alone = head_linear(**{**inputs, "x": inputs["x"][image : image + 1]})
        assert torch.equal(alone[0], together[image])


def test_nan_stays_in_its_image_head_and_row(device):
    inputs = make_inputs(2, 300, torch.float32, device, **LARGE)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][1, 0, 7] = float("nan")
    assert head_linear(**inputs).isnan().any(-1).nonzero().tolist() == [[1, 0, 7]]


@pytest.mark.parametrize("rows", [9, 300])
def test_any_strides(rows, device):
    """Take row-major and column-major tensors, steps between elements, one image or head for all."""
    views = {
        "columns": lambda x: x.mT.contiguous().mT,
        "steps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "same": lambda x: x[:1].expand(x.shape),
        "wide": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    }
    for name in ("x", "weight"):
        for view in views.values():
            inputs = make_inputs(2, rows, torch.float32, device, **LARGE)
            inputs[name] = view(inputs[name])
            assert_matches(OP, head_linear, head_linear_ref, inputs, torch.float32)


def test_the_weights_gradient_lies_as_the_weight():
    """Lay the gradient out as the weight, a view of the parameter: no copy is needed to accumulate it."""
    inputs = make_inputs(2, 300, torch.float32, **LARGE)
    inputs["weight"] = inputs["weight"].mT.contiguous().mT.requires_grad_()
    out = head_linear(**inputs)
    (grad,) = torch.autograd.grad(out, inputs["weight"], torch.ones_like(out))
    assert grad.stride() == inputs["weight"].stride() and grad.stride(1) == 1


def test_only_gradients_that_are_wanted():
    inputs = make_inputs(2, 300, torch.float32, **LARGE)
    every = forward_backward(OP, head_linear, inputs)
    for name in ("x", "weight"):
        leaf = inputs[name].detach().requires_grad_()
        out = head_linear(**{**inputs, name: leaf})
        (grad,) = torch.autograd.grad(out, leaf, dout_like(out, 0))
        assert torch.equal(grad, every[f"d{name}"])


@settings(max_examples=15, deadline=None)
@given(
    images=st.integers(0, 3),
    heads=st.integers(1, 4),
    rows=st.integers(0, 400),
    channels=st.integers(1, 400),
    dim=st.integers(1, 400),
    merge_heads=st.booleans(),
)
def test_any_sizes(images, heads, rows, channels, dim, merge_heads):
    sizes = {"heads": heads, "channels": channels, "dim": dim, "merge_heads": merge_heads}
    assert_matches(OP, head_linear, head_linear_ref, make_inputs(images, rows, torch.float32, **sizes), torch.float32)


ERRORS = [
    ({"x": torch.ones(2, 3, 48)}, ValueError, r"x must have shape \[n, H, R, C\], got \[2, 3, 48\]"),
    ({"x": torch.ones(2, 3, 9, 48, dtype=torch.int32)}, TypeError, "x must be float32 or float16 or .* got int32"),
    ({"weight": torch.ones(3, 32, 47)}, ValueError, r"weight must have shape \[H, D, C\], got \[3, 32, 47\]; C=48"),
    ({"weight": torch.ones(4, 32, 48)}, ValueError, r"weight must have shape \[H, D, C\], got \[4, 32, 48\]; H=3"),
    ({"weight": torch.ones(3, 32, 48).half()}, TypeError, "weight must be float32 like x, got float16"),
    ({"weight": torch.ones(3, 32, 48, device="meta")}, ValueError, "weight must be on cpu like x, got meta"),
]


def test_error_messages():
    inputs = make_inputs(2, 9, torch.float32)
    for change, error, message in ERRORS:
        with pytest.raises(error, match=f"^hia::head_linear: {message}"):
            head_linear(**{**inputs, **change})


def test_no_gradient_of_gradients():
    inputs = make_inputs(2, 9, torch.float32)
    x = inputs["x"].detach().requires_grad_()
    (dx,) = torch.autograd.grad(head_linear(**{**inputs, "x": x}).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="hia::head_linear: gradients of gradients are not implemented"):
        dx.sum().backward()
