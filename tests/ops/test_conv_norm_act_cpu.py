"""``hia::conv_norm_act`` on the CPU: oneDNN with its epilogue, packed weights, a backward without recomputation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hia_kernels
from hia_kernels import conv_norm_act
from hia_kernels.core.products import Products
from hia_kernels.ops.conv_norm_act import cpu
from hia_kernels.ops.conv_norm_act import packed as packing
from hia_kernels.ops.conv_norm_act.packed import (
    conv_norm_act_packed,
    conv_norm_act_packed_,
    conv_norm_act_packed_out,
    pack_conv,
)
from hia_kernels.ops.conv_norm_act.reference import conv_norm_act_ref
from hia_kernels.testing import analysed, assert_close
from tests.inputs import inputs_of
from tests.ops.harness import assert_matches, flops_by_op, forward_backward

OP = "conv_norm_act"
ROOT = Path(__file__).resolve().parents[2]
make_inputs = inputs_of(OP)
F32, BF16 = torch.float32, torch.bfloat16
HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
NEEDS_BF16 = pytest.mark.skipif(not HAS_BF16, reason="oneDNN has no bfloat16 on this CPU")


@pytest.fixture(autouse=True)
def only_onednn():
    """Keep the native kernels, which come first where they are built, out of the way."""
    with hia_kernels.use_backend("cpu"):
        yield


def packed_call(inputs):
    packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"], inputs["stride"])
    return conv_norm_act_packed(inputs["x"], packed, inputs["residual"], inputs["activation"])


def assert_forward_matches(run, inputs, dtype=F32):
    exact, plain = conv_norm_act_ref(**analysed(inputs, dtype)), conv_norm_act_ref(**inputs)
    out = run(inputs)
    assert out.is_contiguous()
    assert_close("out", out, exact, plain, dtype=dtype)


def test_backend_used():
    inputs = make_inputs((5, 4), F32)  # channels that the native kernels don't take
    with hia_kernels.use_backend("auto"):
        forward_backward(OP, conv_norm_act, inputs)
    assert hia_kernels.last_backend(OP) == "cpu"
    with hia_kernels.use_backend("reference"):
        conv_norm_act(**inputs)
    assert hia_kernels.last_backend(OP) == "reference"
    for dtype in (torch.float16, BF16, torch.float64):
        inputs = make_inputs((5, 4), dtype)
        reason = f"cpu: {str(dtype).removeprefix('torch.')} is left to the reference"
        with hia_kernels.use_backend("cpu"), pytest.raises(NotImplementedError, match=reason):
            conv_norm_act(**inputs)
        with hia_kernels.use_backend("auto"):
            conv_norm_act(**inputs)
        assert hia_kernels.last_backend(OP) == "reference"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_size(data):
    """Run odd and prime sizes, one row or column, channels that fill no vector; forward, packed, and in place."""
    size = data.draw(st.tuples(st.sampled_from([1, 2, 3, 7, 16, 31]), st.sampled_from([1, 2, 5, 13, 32])))
    stride, residual = data.draw(st.sampled_from([1, 2])), data.draw(st.booleans())
    options = {"kernel": data.draw(st.sampled_from([1, 3])), "stride": stride, "residual": residual}
    options |= {"channels": data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))}
    options |= {"activation": data.draw(st.sampled_from(["none", "relu", "gelu"]))}
    outputs = options["channels"][1] * ((size[0] - 1) // stride + 1) * ((size[1] - 1) // stride + 1)
    options["images"] = -(-128 // outputs)  # the root mean square of fewer errors is a matter of luck
    dtype = data.draw(st.sampled_from([F32, BF16]))
    inputs = make_inputs(size, dtype, **options)
    with hia_kernels.use_backend("cpu" if dtype == F32 else "auto"):  # bf16 is for packed weights alone
        assert_forward_matches(lambda given: conv_norm_act(**given), inputs, dtype)
    if dtype == F32 or HAS_BF16:
        assert_forward_matches(packed_call, inputs, dtype)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((1, 1), {}),
        ((2, 2), {"stride": 2}),
        ((5, 4), {"channels": (8, 1), "kernel": 1}),
        ((1, 3), {"channels": (1, 1)}),
    ],
    ids=["one-pixel", "to-one-pixel", "to-one-channel", "one-channel"],
)
def test_outputs_of_one_pixel_or_channel(size, options, activation):
    """Add a residual that is NCHW and channels last at once: torch 2.11 can't describe such an output to oneDNN."""
    inputs = make_inputs(size, F32, images=64, activation=activation, residual=True, **options)
    residual = inputs["residual"].clone()
    for run in (lambda given: conv_norm_act(**given), packed_call):
        assert_forward_matches(run, inputs)
    assert torch.equal(inputs["residual"], residual)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_scales_of_zero_have_gradients(activation):
    """Start a block's last norm at zero, where the convolution's output cannot be recovered from the result."""
    inputs = make_inputs((6, 5), F32, activation=activation, residual=True)
    inputs["scale"][:5] = torch.tensor([0.0, -1.0, 0.0, 1e-20, -0.0])
    assert_matches(OP, conv_norm_act, conv_norm_act_ref, inputs, F32)


@pytest.mark.parametrize(("kernel", "residual"), [(1, True), (3, False)])
def test_nan_under_relu_is_lost_alone(kernel, residual):
    """Find what docs/conv_norm_act.md says of oneDNN's ReLU: 0 or NaN for NaN, every other element as without it."""
    inputs = make_inputs((9, 8), F32, channels=(32, 64), kernel=kernel, residual=residual)
    spoilt = {**inputs, "x": inputs["x"].clone()}
    spoilt["x"][0, 4, 4, 7] = float("nan")
    reached = conv_norm_act_ref(**spoilt).isnan()
    clean, out = conv_norm_act(**inputs), conv_norm_act(**spoilt)
    assert reached.any() and (out[reached].isnan() | (out[reached] == 0)).all()
    assert torch.equal(out[~reached], clean[~reached])


def test_gradients_of_a_large_image():
    """Sum 25,600 outputs a channel: the scale's gradient comes from the weight's, which must not lose digits there."""
    inputs = make_inputs((160, 160), F32, images=1, channels=(64, 64))
    inputs["x"].relu_()
    assert_matches(OP, conv_norm_act, conv_norm_act_ref, inputs, F32)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_in_strips(kernel, stride, monkeypatch):
    monkeypatch.setattr(cpu, "LONGEST_SUM", 20)
    inputs = make_inputs((11, 14), F32, kernel=kernel, stride=stride)
    assert_matches(OP, conv_norm_act, conv_norm_act_ref, inputs, F32)


@pytest.mark.parametrize("channels", [(4, 4), (8, 8), (8, 32), (32, 8), (16, 16), (12, 128)], ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_gradients_of_a_narrow_stack(kernel, stride, channels, monkeypatch):
    """Run strips of several images and of a few rows, the last ones smaller; short sums with a remainder."""
    monkeypatch.setattr(cpu, "SHORT_SUM", 32)
    for longest in (30, 400):
        monkeypatch.setattr(cpu, "LONGEST_SUM", longest)
        monkeypatch.setattr(cpu, "WINDOWS", longest)
        inputs = make_inputs((11, 9), F32, images=5, kernel=kernel, stride=stride, channels=channels)
        assert_matches(OP, conv_norm_act, conv_norm_act_ref, inputs, F32)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("stride", [1, 2])
def test_few_pixels_of_many_channels_are_a_product(stride, activation, monkeypatch):
    """Run 1 x 1 on 4 x 3 pixels: with many channels oneDNN would spend its time on the weight's layout."""
    called, linear = [], Products.linear
    monkeypatch.setattr(Products, "linear", lambda *args: called.append(args) or linear(*args))
    for channels, products in ((95, 0), (96, 1)):
        inputs = make_inputs((4, 3) if stride == 1 else (8, 6), F32, channels=(channels, 48), kernel=1, stride=stride)
        given = {**inputs, "residual": torch.randn(2, 4, 3, 48), "activation": activation}
        called.clear()
        conv_norm_act(**given)
        assert len(called) == products and hia_kernels.last_backend(OP) == "cpu"
        for residual in (given["residual"], None):
            assert_matches(OP, conv_norm_act, conv_norm_act_ref, {**given, "residual": residual}, F32)


ROUTES = {  # (kernel, stride, channels, whether the scale has a gradient): the function, of cpu's, that must serve
    "narrow-1x1": (1, 1, 8, True, "_summed_products"),
    "narrow-1x1-s2": (1, 2, 8, False, "_summed_products"),  # never oneDNN: it writes past its buffers there
    "few-channels": (3, 1, 8, True, "_weight_gradient_by_windows"),
    "few-channels-s2": (3, 2, 4, True, "_weight_gradient_by_windows"),
    "strips-s2-narrow": (3, 2, 8, True, "_weight_gradient_by_strips"),
    "strips": (3, 1, 16, True, "_weight_gradient_by_strips"),
    "strips-s2": (3, 2, 64, True, "_weight_gradient_by_strips"),
    "taps-one-strip": (3, 1, 128, True, "_weight_gradient_by_taps"),
    "taps": (3, 2, 128, True, "_weight_gradient_by_taps"),
    "whole": (3, 1, 8, False, "_backward"),
}


@pytest.mark.parametrize(("kernel", "stride", "channels", "exact", "route"), ROUTES.values(), ids=ROUTES)
def test_route_of_the_weight_gradient(kernel, stride, channels, exact, route, monkeypatch):
    inputs = make_inputs((8, 8), F32, kernel=kernel, stride=stride, channels=(channels, channels))
    taken, known = [], {row[4] for row in ROUTES.values()}
    for name in known:
        function = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, f=function, name=name: taken.append(name) or f(*args))
    inputs["weight"].requires_grad_()
    inputs["scale"].requires_grad_(exact)
    conv_norm_act(**inputs).sum().backward()
    assert taken[0] == route and hia_kernels.last_backend(OP) == "cpu"
    if kernel == 1:
        assert "_backward" not in taken


@pytest.mark.parametrize(("activation", "kept"), [("relu", 2), ("none", 1)])
def test_saves_input_and_output_alone(activation, kept):
    inputs = make_inputs((12, 12), F32, activation=activation, residual=True, channels=(16, 16))
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    for name in ("x", "weight", "scale", "shift", "residual"):
        inputs[name] = inputs[name].detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        conv_norm_act(**inputs)
    assert sum(tensor.dim() == 4 and tensor.shape[1] == 12 for tensor in saved) == kept


def test_gradients_never_share_memory_with_the_incoming_one():
    inputs = make_inputs((6, 5), F32, activation="none", residual=True)
    out = conv_norm_act(**inputs)
    mask = [False, False, False, False, True]
    tensors = (inputs[name] for name in ("x", "weight", "scale", "shift", "residual"))
    dresidual = torch.ops.hia.conv_norm_act_bwd(out, *tensors, out, 1, "none", mask)[4]
    assert torch.equal(dresidual, out) and dresidual.data_ptr() != out.data_ptr()


@pytest.mark.parametrize("dtype", [F32, pytest.param(BF16, marks=NEEDS_BF16)], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_packed_over_its_residual(dtype, activation):
    inputs = make_inputs((9, 12), dtype, residual=True, stride=2, activation=activation)
    packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"], 2)
    residual = inputs["residual"].contiguous()
    beside = conv_norm_act_packed(inputs["x"], packed, residual.clone(), activation)
    out = conv_norm_act_packed_(residual, inputs["x"], packed, activation)
    assert out is residual  # oneDNN without AVX2 adds in another order when it writes over the residual
    for result in (out, beside):
        assert_forward_matches(lambda _, result=result: result, inputs, dtype)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_strips_bring_their_own_rows(kernel, stride):
    """Cut rows out of an image, with their neighbours and zeros at its borders: they give the image's own rows."""
    inputs = make_inputs((13, 10), F32, images=1, kernel=kernel, stride=stride)
    packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"], stride)
    whole, pad = conv_norm_act_packed(inputs["x"], packed), kernel // 2
    padded = torch.nn.functional.pad(inputs["x"], (0, 0, 0, 0, pad, pad))
    for first, last in ((0, 3), (3, 6), (2, whole.shape[1])):
        strip = padded[:, first * stride : (last - 1) * stride + kernel]
        out = conv_norm_act_packed(strip, packed, pad_rows=False)
        assert_close("out", out, whole[:, first:last].double(), whole[:, first:last], dtype=F32)


def test_sizes_share_layouts_and_the_last_are_kept(monkeypatch):
    inputs = make_inputs((8, 8), F32, channels=(64, 128))
    packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"])
    assert packed.layout(8, 8) is packed.layout(8, 8)
    made = []
    layout = type(cpu.LAYOUT)
    pack = layout.__call__
    monkeypatch.setattr(layout, "__call__", lambda *args: made.append(args[4:]) or pack(*args))
    monkeypatch.setattr(layout, "describe", lambda *_: b"even" if made[-1][0][0] % 2 == 0 else b"odd")
    packed.layouts.clear(), packed.kinds.clear()
    even = packed.layout(8, 8)
    assert packed.layout(6, 6) is even and packed.layout(5, 5) is not even and packed.layout(6, 6, False) is even
    assert [packed.layout(side, side) is even for side in (8, 6, 5)] == [True, True, False]
    assert made == [((8, 8), True), ((6, 6), True), ((5, 5), True), ((6, 6), False)]  # no size twice
    assert packed.nbytes == 2 * 4 * inputs["weight"].numel() + 2 * 4 * 128

    monkeypatch.setattr(layout, "describe", lambda *_: b"")  # an older torch: a layout a size
    for side in (9, 10, 11, 12):
        packed.layout(side, side)
    assert len(packed.layouts) == packing.KEPT_LAYOUTS == 3
    monkeypatch.setattr(packing, "KEPT_SIZES", 2)
    packed.layout(13, 13)
    assert list(packed.kinds) == [("oneDNN", 13, 13, True)]
    x = torch.randn(1, 11, 3, 64)
    expected = conv_norm_act(x, inputs["weight"], inputs["scale"], inputs["shift"])
    assert_close("out", conv_norm_act_packed(x, packed), expected.double(), expected, dtype=F32)


def test_flops_of_packed_ops():
    inputs = make_inputs((5, 4), F32, channels=(8, 16), residual=True)
    packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"])
    x, residual = inputs["x"], inputs["residual"].contiguous()
    count = 2 * 2 * 5 * 4 * 16 * 8 * 9
    assert flops_by_op(lambda: conv_norm_act_packed(x, packed)) == {"hia.conv_norm_act_packed": count}
    assert flops_by_op(lambda: conv_norm_act_packed_(residual, x, packed)) == {"hia.conv_norm_act_packed_": count}
    assert flops_by_op(lambda: conv_norm_act_packed_out(residual, x, packed)) == {"hia.conv_norm_act_packed_out": count}


def test_packed_into_a_tensor():
    inputs = make_inputs((9, 12), F32, stride=2)
    packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"], 2)
    expected = conv_norm_act_packed(inputs["x"], packed)
    out = torch.full_like(expected, torch.nan)
    assert conv_norm_act_packed_out(out, inputs["x"], packed) is out and torch.equal(out, expected)


def test_packed_errors():
    inputs = make_inputs((5, 4), F32, residual=True)
    x, weight, scale, shift, residual = (inputs[name] for name in ("x", "weight", "scale", "shift", "residual"))
    packed = pack_conv(weight, scale, shift)
    calls = [
        (
            lambda: pack_conv(weight.half(), scale, shift),
            NotImplementedError,
            "weight can't be packed: cpu: float16 is",
        ),
        (lambda: pack_conv(weight, scale[1:], shift), ValueError, r"scale must have shape \[OC\], got \[23\]"),
        (lambda: pack_conv(weight, scale.double(), shift), TypeError, "scale must be float32 like weight, got float64"),
        (lambda: pack_conv(weight, scale, shift, 3), ValueError, "stride must be 1 or 2, got 3"),
        (lambda: pack_conv(weight.new_ones(3, 3, 5, 5), scale[:3], shift[:3]), ValueError, "weight's K must be 1 or"),
        (lambda: conv_norm_act_packed(x[..., :5], packed), ValueError, r"x must have shape \[N, IH, IW, 16\]"),
        (
            lambda: conv_norm_act_packed(x.half(), packed),
            TypeError,
            "weight must be float16 like x, got float32",
        ),
        (lambda: conv_norm_act_packed(x, packed, residual[:, 1:]), ValueError, "residual must have the output's"),
        (lambda: conv_norm_act_packed(x, packed, activation="silu"), ValueError, "activation must be 'none' or"),
        (lambda: conv_norm_act_packed(x[:, :2], packed, pad_rows=False), ValueError, "x must hold at least one out"),
        (
            lambda: conv_norm_act_packed(x.requires_grad_(), packed),
            RuntimeError,
            "x must not be part of a gradient graph",
        ),
    ]
    for call, error, message in calls:
        with pytest.raises(error, match=f"^hia::conv_norm_act_packed: {message}"):
            call()
    x.requires_grad_(False)
    for packs, image in ((None, x), (x, packed)):
        with pytest.raises(
            TypeError, match="^hia::conv_norm_act_packed: (packed must be of pack_conv|x must be a tensor)"
        ):
            conv_norm_act_packed(image, packs)
    with pytest.raises(TypeError, match="^hia::conv_norm_act_packed_: x must be a tensor, got PackedConv"):
        conv_norm_act_packed_(x, packed, residual)
    with pytest.raises(ValueError, match=r"^hia::conv_norm_act_packed_: residual must be contiguous, got strides"):
        conv_norm_act_packed_(residual, x, packed)
    with pytest.raises(ValueError, match=r"^hia::conv_norm_act_packed_out: out must be contiguous, got strides"):
        conv_norm_act_packed_out(residual, x, packed)
    with pytest.raises(ValueError, match=r"^hia::conv_norm_act_packed_out: out must have the output's"):
        conv_norm_act_packed_out(residual[:, 1:], x, packed)
    message = "weight can.t be packed: reference: has no conv_norm_act_pack"
    with hia_kernels.use_backend("reference"), pytest.raises(NotImplementedError, match=message):
        pack_conv(weight, scale, shift)
    with torch.autocast("cpu"), pytest.raises(NotImplementedError, match="autocast is on"):
        pack_conv(weight, scale, shift)


def test_a_backend_that_was_forced_after_packing():
    """Ask the table again at every call: it gives another layout, or every reason why there is none."""
    inputs = make_inputs((5, 4), F32, channels=(32, 32))
    packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"])
    assert packed.unsupported_reasons() == []
    with hia_kernels.use_backend("reference"):
        assert packed.unsupported_reasons() == ["reference: has no conv_norm_act_pack"] and not packed.writes_out()
        with pytest.raises(
            NotImplementedError, match="^hia::conv_norm_act_packed: weight can't be packed: reference: "
        ):
            conv_norm_act_packed(inputs["x"], packed)
    with hia_kernels.use_backend("auto"):
        out = conv_norm_act_packed(inputs["x"], packed)
    assert_close("out", out, conv_norm_act_ref(**analysed(inputs, F32)), conv_norm_act_ref(**inputs), dtype=F32)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_scale_and_shift_of_any_strides(activation, residual):
    """Pass a column of a table: oneDNN reads its bias as if it were contiguous, and here would find NaN."""
    inputs = make_inputs((6, 5), F32, activation=activation, residual=residual)
    for name in ("scale", "shift"):
        table = torch.full((inputs[name].numel(), 2), float("nan"), dtype=F32)
        table[:, 0] = inputs[name]
        inputs[name] = table[:, 0]
    in_place = {**inputs, "residual": make_inputs((6, 5), F32, residual=True)["residual"].contiguous()}

    def over_its_residual(given):
        packed = pack_conv(given["weight"], given["scale"], given["shift"])
        return conv_norm_act_packed_(given["residual"].clone(), given["x"], packed, given["activation"])

    assert_forward_matches(lambda given: conv_norm_act(**given), inputs)
    assert_forward_matches(packed_call, inputs)
    assert_forward_matches(over_its_residual, in_place)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_reference_keeps_clear_of_onednns_fault(dtype):
    """Differentiate a 1 x 1 of few channels with stride 2, in which oneDNN writes past its buffers; it may die."""
    code = f"""
import torch
from hia_kernels import conv_norm_act, use_backend
from hia_kernels.ops.conv_norm_act.reference import conv_norm_act_ref
from tests.inputs import inputs_of
torch.set_num_threads(2)
inputs = inputs_of("conv_norm_act")((20, 20), {dtype}, images=3, channels=(7, 8), kernel=1, stride=2)
for name in ("x", "weight", "scale"):
    inputs[name] = inputs[name].detach().requires_grad_()
wrt = [inputs[name] for name in ("x", "weight", "scale")]
with use_backend("reference"):
    for _ in range(20):
        for function in (conv_norm_act, conv_norm_act_ref):
            torch.autograd.grad(function(**inputs).sum(), wrt)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
