"""``hia::conv_norm_act``."""

import pytest
import torch

from hia_kernels import conv_norm_act
from hia_kernels.ops.conv_norm_act.reference import conv_norm_act_bwd_ref, conv_norm_act_ref
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
    assert_matches,
    assert_repeatable,
    flops,
    flops_by_op,
    forward_backward,
    opcheck,
)

OP = "conv_norm_act"
make_inputs = inputs_of(OP)
CASES = [
    pytest.param((9, 12), {"kernel": 1, "activation": "none"}, id="1x1-none"),
    pytest.param((9, 12), {"residual": True}, id="3x3-relu-residual"),
    pytest.param((7, 11), {"stride": 2, "activation": "gelu", "residual": True, "nchw": True}, id="3x3-s2-gelu-odd"),
    pytest.param((10, 7), {"kernel": 1, "stride": 2, "channels": (13, 5)}, id="1x1-s2-ragged-channels"),
    pytest.param((1, 1), {"images": 1, "residual": True}, id="one-pixel"),
    pytest.param((8, 8), {"images": 0, "residual": True}, id="no-images"),
    pytest.param((112, 112), {"channels": (64, 64), "residual": True}, id="layer1-448-px", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("size", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(size, options, dtype, device):
    assert_matches(OP, conv_norm_act, conv_norm_act_ref, make_inputs(size, dtype, device, **options), dtype)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_backward_is_autograd_of_reference(activation, device):
    inputs = make_inputs((7, 10), torch.float64, device, stride=2, activation=activation, residual=True)
    assert_backward_is_autograd_of_reference(OP, conv_norm_act, conv_norm_act_ref, inputs)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_gradcheck(activation):
    options = {"images": 1, "channels": (2, 3), "stride": 2, "activation": activation, "residual": True}
    assert_gradcheck(OP, conv_norm_act, make_inputs((3, 4), torch.float64, **options))


def test_agrees_with_pytorch_batch_norm(device):
    """Check the reference against a convolution with bias and a folded BatchNorm2d in evaluation."""
    conv = torch.nn.Conv2d(16, 24, 3, stride=2, padding=1, device=device, dtype=torch.float64)
    norm = torch.nn.BatchNorm2d(24, device=device, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in (norm.weight, norm.bias, norm.running_mean):
            parameter.normal_()
        norm.running_var.uniform_(0.5, 2)
        x = torch.randn(2, 9, 12, 16, device=device, dtype=torch.float64)
        expected = norm(conv(x.permute(0, 3, 1, 2))).relu().permute(0, 2, 3, 1)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias + scale * (conv.bias - norm.running_mean)
        out = conv_norm_act(x, conv.weight, scale, shift, stride=2)
    assert_close("out", out, expected, expected, dtype=torch.float64, slack=FP64_SLACK)


def test_opcheck(device):
    for options in ({"activation": "none"}, {"stride": 2, "nchw": True}, {"activation": "gelu", "residual": True}):
        inputs = make_inputs((5, 4), torch.float32, device, channels=(3, 6), **options)
        opcheck(OP, torch.ops.hia.conv_norm_act.default, inputs)
    x, weight, scale, shift, residual, *_ = inputs.values()
    out = conv_norm_act(**inputs)
    bwd = torch.ops.hia.conv_norm_act_bwd.default
    arguments = (x, weight, scale, shift, residual, out)
    for dout in (torch.randn_like(out), torch.randn(2, 6, 5, 4, device=device).permute(0, 2, 3, 1)):
        torch.library.opcheck(bwd, (dout, *arguments, 1, "none", [True] * 5))
        torch.library.opcheck(bwd, (dout, *arguments, 1, "gelu", [False, True, False, True, False]))
        torch.library.opcheck(bwd, (dout, *arguments, 1, "relu", [True, False, True, False, False]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend, device):
    assert_compiles(OP, conv_norm_act, make_inputs((5, 4), torch.float32, device, residual=True), backend)


def test_exports(device):
    assert_exports(conv_norm_act, make_inputs((5, 4), torch.float32, device, residual=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype, device):
    inputs = make_inputs((5, 4), torch.float32, device, residual=True)
    assert_autocast(OP, conv_norm_act, inputs, dtype, cast=("x", "weight", "residual"), out_dtype=dtype)
    for name in ("scale", "shift"):
        message = f"^hia::conv_norm_act: {name} must be float32( beside .*)?, got {str(dtype).removeprefix('torch.')}"
        with torch.autocast(device, dtype=dtype), pytest.raises(TypeError, match=message):
            conv_norm_act(**{**inputs, name: inputs[name].to(dtype)})


def test_flops():
    for activation in ("none", "relu", "gelu"):
        check_flops(make_inputs((5, 4), torch.float32, stride=2, activation=activation))


def check_flops(inputs):
    forward = flops(conv_norm_act_ref, **inputs)
    assert forward == 2 * 2 * 3 * 2 * 24 * 16 * 9
    assert flops_by_op(lambda: conv_norm_act(**inputs)) == {"hia.conv_norm_act": forward}
    x, weight, scale, shift, residual, *options = inputs.values()
    out = conv_norm_act(**inputs)
    arguments = (torch.ones_like(out), x, weight, scale, shift, residual, out, *options)
    masks = ([True, True, True, True, False], [True, False, False, True, False], [False, False, False, True, False])
    masks += ([False, False, True, False, False],)
    for mask in masks:
        is_gelu = inputs["activation"] == "gelu"
        recomputed = is_gelu or (mask[2] and not mask[1])
        backward = flops(torch.ops.hia.conv_norm_act_bwd, *arguments, mask)
        assert backward == (recomputed + sum(mask[:2])) * forward
        spared = mask[1] and mask[2] and not is_gelu  # the reference computes y for dscale whatever else is there
        assert flops(conv_norm_act_bwd_ref, *arguments, mask) == backward + spared * forward


def test_two_runs_are_bit_identical(device):
    assert_repeatable(OP, conv_norm_act, make_inputs((33, 17), torch.float32, device, residual=True))


def test_images_are_independent(device):
    inputs = make_inputs((9, 12), torch.float32, device, images=3, residual=True)
    exact = conv_norm_act_ref(**analysed(inputs, torch.float32))
    together = conv_norm_act(**inputs)
    pairs = zip(inputs["x"].split(1), inputs["residual"].split(1), strict=True)
    one_by_one = torch.cat([conv_norm_act(**{**inputs, "x": x, "residual": residual}) for x, residual in pairs])
    assert_close("out", one_by_one, exact, together, dtype=torch.float32)


def test_nan_in_another_image_does_not_leak(device):
    inputs = make_inputs((9, 12), torch.float32, device, images=2)
    dirty = inputs["x"].clone()
    dirty[0] = float("nan")
    out = conv_norm_act(**{**inputs, "x": dirty})
    assert out[1].isfinite().all() and torch.equal(out[1], conv_norm_act(**inputs)[1])


ERRORS = [
    ({"x": torch.ones(2, 5, 16)}, ValueError, r"x must have shape \[N, IH, IW, C\], got \[2, 5, 16\]"),
    ({"x": torch.ones(2, 0, 4, 16)}, ValueError, r"x must hold at least one pixel, got shape \[2, 0, 4, 16\]"),
    ({"x": torch.ones(2, 5, 4, 16).int()}, TypeError, "x must be float32 or float16 or .* got int32"),
    ({"weight": torch.ones(24, 15, 3, 3)}, ValueError, r"weight must have shape \[OC, C, K, K\], .*; C=16 is fixed by"),
    ({"weight": torch.ones(24, 16, 3, 1)}, ValueError, r"weight must have shape \[OC, C, K, K\], .*; K=3 is fixed by"),
    ({"weight": torch.ones(24, 16, 5, 5)}, ValueError, "weight's K must be 1 or 3, got 5"),
    ({"weight": torch.ones(24, 16, 3, 3).half()}, TypeError, "weight must be float32 like x, got float16"),
    ({"scale": torch.ones(23)}, ValueError, r"scale must have shape \[OC\], got \[23\]; OC=24 is fixed by weight"),
    ({"scale": torch.ones(24).double()}, TypeError, "scale must be float32 like x, got float64"),
    ({"shift": torch.ones(24, 1)}, ValueError, r"shift must have shape \[OC\], got \[24, 1\]"),
    ({"shift": torch.ones(24).half()}, TypeError, "shift must be float32 like x, got float16"),
    ({"residual": torch.ones(2, 4, 4, 24)}, ValueError, r"residual must have the output's size \[5, 4\], got \[4, 4\]"),
    ({"residual": torch.ones(1, 5, 4, 24)}, ValueError, "residual must have shape .*; N=2 is fixed by x"),
    ({"residual": torch.ones(2, 5, 4, 24).half()}, TypeError, "residual must be float32 like x, got float16"),
    ({"stride": 3}, ValueError, "stride must be 1 or 2, got 3"),
    ({"activation": "silu"}, ValueError, "activation must be 'none' or 'relu' or 'gelu', got 'silu'"),
    ({"scale": torch.ones(24, device="meta")}, ValueError, "scale must be on cpu like x, got meta"),
]


def test_error_messages():
    inputs = make_inputs((5, 4), torch.float32)
    for change, error, message in ERRORS:
        with pytest.raises(error, match=f"^hia::conv_norm_act: {message}"):
            conv_norm_act(**{**inputs, **change})


def test_no_gradient_of_gradients():
    inputs = make_inputs((5, 4), torch.float32, activation="gelu")
    x = inputs["x"].detach().requires_grad_()
    (dx,) = torch.autograd.grad(conv_norm_act(**{**inputs, "x": x}).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="hia::conv_norm_act: gradients of gradients are not implemented"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_images_of_one_column_in_halves(kernel, stride, dtype):
    """Compare with fp32: with stride 2 oneDNN's gradient of a weight holds what memory held, PyTorch's own with it."""
    for height in (1, 2, 5):
        halves = make_inputs((height, 1), dtype, kernel=kernel, stride=stride, activation="none")
        singles = {name: x.float() if isinstance(x, torch.Tensor) else x for name, x in halves.items()}
        for _ in range(3):
            freed = [torch.full((4000,), float("nan")) for _ in range(20)]
            del freed
            got, expected = (forward_backward(OP, conv_norm_act, inputs) for inputs in (halves, singles))
            for name, x in got.items():
                limit = 0.02 * expected[name].abs().max()
                assert (x.float() - expected[name]).abs().max() <= limit, f"{name}, {height} rows"
