"""torch.func and forward-mode AD: the right values, or an error that names the op."""

import pytest
import torch
from torch.autograd import forward_ad

import hia_kernels
from tests.inputs import OPS, small_inputs
from tests.ops.harness import leaves

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap takes the images one by one

F32 = torch.float32
REFUSAL = r"hia::{}\w*: forward-mode AD .* is not implemented"


@pytest.fixture(params=OPS)
def call(request):
    """Return an op, its first differentiable argument, and the op as a function of it."""
    op = request.param
    inputs = small_inputs(op, F32)
    name = next(name for name in leaves(op, inputs) if name != "hidden" or op != "inject_rows")  # which is only added

    def function(x):
        out = getattr(hia_kernels, op)(**{**inputs, name: x})
        return out[0] if isinstance(out, tuple) else out

    return op, inputs[name].detach(), function


def gradient(function, x):
    """Return the gradient of the sum of squares by ``backward``."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x).square().sum(), x)[0]


def test_jvp_is_refused(call):
    op, x, function = call
    with pytest.raises(NotImplementedError, match=REFUSAL.format(op)):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with pytest.raises(NotImplementedError, match=REFUSAL.format(op)):
        torch.func.jvp(lambda y: torch.func.grad(lambda z: function(z).sum())(y), (x,), (torch.ones_like(x),))


def test_dual_tensors_are_refused_and_others_served(call):
    op, x, function = call
    plain = function(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=REFUSAL.format(op)):
            function(dual)
        with pytest.raises(NotImplementedError, match=REFUSAL.format(op)):
            function(forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x)))
        assert torch.equal(function(x), plain)


@pytest.mark.parametrize("function", ["linear", "linear_bwd"])
def test_raw_ops_refuse_tangents(function):
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    arguments = {"linear": (weight, None), "linear_bwd": (x, weight, [True, True, False])}[function]
    first = x if function == "linear" else torch.randn(3, 5)
    overload = getattr(torch.ops.hia, function)
    with pytest.raises(NotImplementedError, match=REFUSAL.format("linear")):
        torch.func.jvp(lambda y: overload(y, *arguments), (first,), (torch.ones_like(first),))


def test_func_grad_and_vjp_are_backward(call):
    _, x, function = call
    expected = gradient(function, x)
    assert torch.equal(torch.func.grad(lambda y: function(y).square().sum())(x), expected)
    out, pull = torch.func.vjp(function, x)
    assert torch.equal(pull(2 * out)[0], expected)


def test_vmap_is_a_loop(call):
    _, x, function = call
    stack = torch.stack([x, x * 0.5])
    out = torch.func.vmap(function)(stack)
    assert torch.equal(out, torch.stack([function(y) for y in stack]))
    grads = torch.func.vmap(torch.func.grad(lambda y: function(y).square().sum()))(stack)
    assert torch.equal(grads, torch.stack([gradient(function, y) for y in stack]))


def test_jacrev_is_the_jacobian():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    found = torch.func.jacrev(lambda y: hia_kernels.linear(y, weight))(x)
    expected = torch.func.jacrev(lambda y: torch.nn.functional.linear(y, weight))(x)
    torch.testing.assert_close(found, expected)


def test_hessians_are_refused(call):
    op, x, function = call
    message = rf"hia::{op}\w*: (gradients of gradients are|forward-mode AD .* is) not implemented"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(lambda y: torch.func.grad(lambda z: function(z).square().sum())(y).sum())(x)
