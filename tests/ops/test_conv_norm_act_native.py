"""``hia::conv_norm_act`` by the native extension: direct and Winograd, packed weights, gradients, every ISA."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hia_kernels
from hia_kernels import conv_norm_act
from hia_kernels.core import native as extension
from hia_kernels.ops.conv_norm_act import native
from hia_kernels.ops.conv_norm_act.packed import (
    conv_norm_act_packed,
    conv_norm_act_packed_,
    conv_norm_act_packed_out,
    pack_conv,
    serving_layout,
)
from hia_kernels.ops.conv_norm_act.reference import conv_norm_act_ref
from hia_kernels.testing import analysed, assert_close, expect, upcast
from tests.inputs import differentiable, inputs_of
from tests.ops.harness import assert_identical, assert_matches, flops_by_op, forward_backward

OP = "conv_norm_act"
make_inputs = inputs_of(OP)
F32 = torch.float32
WIDE = {"channels": (32, 64)}
REASONS = native.unavailable_reasons()
pytestmark = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))


@pytest.fixture(autouse=True)
def only_native():
    with hia_kernels.use_backend("native"):
        yield


def packed_call(inputs):
    packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"], inputs["stride"])
    return conv_norm_act_packed(inputs["x"], packed, inputs["residual"], inputs["activation"])


def assert_forward_matches(run, inputs):
    exact, plain = conv_norm_act_ref(**analysed(inputs, F32)), conv_norm_act_ref(**inputs)
    out = run(inputs)
    assert hia_kernels.last_backend(OP) == "native" and out.is_contiguous()
    assert_close("out", out, exact, plain, dtype=F32)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_size(data):
    """Run odd and prime sizes, one row or column, half panels; forward, packed, in place, into a given tensor."""
    size = data.draw(st.tuples(st.sampled_from([1, 2, 3, 7, 16, 31]), st.sampled_from([1, 2, 5, 13, 32, 67])))
    stride, residual = data.draw(st.sampled_from([1, 2])), data.draw(st.booleans())
    options = {"kernel": data.draw(st.sampled_from([1, 3])), "stride": stride, "residual": residual}
    options |= {"channels": data.draw(st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([32, 96, 160])))}
    options |= {"activation": data.draw(st.sampled_from(["none", "relu", "gelu"])), "images": 4}
    options |= {"nchw": data.draw(st.booleans())}
    inputs = make_inputs(size, F32, **options)
    assert_forward_matches(lambda given: conv_norm_act(**given), inputs)
    assert_forward_matches(packed_call, inputs)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_gradient(data):
    """Compare Winograd's gradients of the image and of the weight."""
    size = data.draw(st.tuples(st.sampled_from([1, 2, 3, 7, 16, 31]), st.sampled_from([1, 2, 5, 13, 32, 67])))
    options = {"channels": data.draw(st.tuples(st.sampled_from([32, 64, 160]), st.sampled_from([32, 96]))), "images": 4}
    options |= {
        "activation": data.draw(st.sampled_from(["none", "relu", "gelu"])),
        "residual": data.draw(st.booleans()),
    }
    inputs = make_inputs(size, F32, **options)
    assert_matches(OP, conv_norm_act, conv_norm_act_ref, off_the_kink(inputs), F32)


def off_the_kink(inputs):
    """Return a residual that moves whatever lies so near zero that rounding would decide ReLU's derivative."""
    if inputs["activation"] != "relu":
        return inputs
    z = conv_norm_act_ref(**upcast({**inputs, "activation": "none"}, torch.float64))
    nudge = torch.where(z.abs() < 1e-4, 1e-3, 0.0).float()
    return {**inputs, "residual": nudge if inputs["residual"] is None else inputs["residual"] + nudge}


@pytest.mark.parametrize(("channels", "side"), [(64, 160), (512, 40)])
def test_gradients_of_many_tiles(channels, side):
    """Run several blocks of tiles, and sums long enough to lose digits if they were summed in sequence.

    Without an activation: among so many outputs one lies so near ReLU's kink that rounding decides its side.
    """
    inputs = make_inputs((side, side), F32, images=1, channels=(channels, channels), activation="none")
    inputs["x"].relu_()
    assert_matches(OP, conv_norm_act, conv_norm_act_ref, inputs, F32)


@pytest.mark.parametrize("kernel", [1, 3])
def test_image_alone_and_number_of_threads_change_no_bit(kernel):
    inputs = make_inputs((45, 37), F32, kernel=kernel, images=3, **WIDE)
    packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"])
    together = conv_norm_act_packed(inputs["x"], packed)
    for image in range(3):
        assert torch.equal(conv_norm_act_packed(inputs["x"][image : image + 1], packed)[0], together[image])
    threads = torch.get_num_threads()
    mixed = {"kernel": 3, "images": 2, **WIDE}
    before = forward_backward(OP, conv_norm_act, make_inputs((45, 37), F32, **mixed))
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(conv_norm_act_packed(inputs["x"], packed), together)
        again = forward_backward(OP, conv_norm_act, make_inputs((45, 37), F32, **mixed))
    finally:
        torch.set_num_threads(threads)
    for name in ("out", "dx", "dweight"):
        assert_identical({name: before[name]}, {name: again[name]})


def test_nothing_outside_the_result_is_written_and_all_of_it_is():
    for kernel, stride in ((1, 1), (3, 1), (3, 2)):
        inputs = make_inputs((9, 13), F32, kernel=kernel, stride=stride, images=1, **WIDE)
        packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"], stride)
        expected = conv_norm_act_packed(inputs["x"], packed)
        guarded = torch.full((expected.numel() + 128,), torch.nan)
        out = guarded[64:-64].view(expected.shape)
        assert conv_norm_act_packed_out(out, inputs["x"], packed) is out and torch.equal(out, expected)
        assert guarded[:64].isnan().all() and guarded[-64:].isnan().all()


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (1, 2)])
def test_packed_over_its_residual(kernel, stride, activation):
    options = {"kernel": kernel, "stride": stride, "activation": activation, "residual": True}
    inputs = make_inputs((9, 12), F32, **options, **WIDE)
    packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"], stride)
    residual = inputs["residual"].contiguous()
    expected = conv_norm_act_packed(inputs["x"], packed, residual.clone(), activation)
    out = conv_norm_act_packed_(residual, inputs["x"], packed, activation)
    assert out is residual and torch.equal(out, expected)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_strips_bring_their_own_rows(kernel, stride):
    inputs = make_inputs((13, 10), F32, images=1, kernel=kernel, stride=stride, **WIDE)
    packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"], stride)
    exact, plain = conv_norm_act_ref(**analysed(inputs, F32)), conv_norm_act_ref(**inputs)
    pad = kernel // 2
    padded = torch.nn.functional.pad(inputs["x"], (0, 0, 0, 0, pad, pad))
    for first, last in ((0, 3), (3, 6), (2, exact.shape[1])):
        strip = padded[:, first * stride : (last - 1) * stride + kernel]
        out = conv_norm_act_packed(strip, packed, pad_rows=False)
        assert_close("out", out, exact[:, first:last], plain[:, first:last], dtype=F32)


def test_one_layout_for_all_sizes():
    inputs = make_inputs((8, 8), F32, **WIDE)
    packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"])
    assert packed.writes_out() and packed.layout(8, 8) is packed.layout(5, 31, False)
    assert packed.layout(8, 8).shape == (64, 32, 16)
    assert packed.nbytes == 4 * 64 * 32 * 16 + 2 * 4 * 64
    assert serving_layout(inputs["weight"]).nbytes(inputs["weight"], 1) == 4 * 64 * 32 * 16
    with hia_kernels.use_backend("cpu"):
        assert not packed.writes_out() and packed.layout(8, 8).shape == (64, 32, 3, 3)


def test_what_takes_which_backend():
    with hia_kernels.use_backend("auto"):
        for side, kernel, stride, expected in (
            (32, 3, 1, "native"),
            (8, 3, 1, "cpu"),
            (32, 3, 2, "cpu"),
            (32, 1, 1, "cpu"),
        ):
            inputs = make_inputs((side, side), F32, images=1, kernel=kernel, stride=stride, **WIDE)
            forward_backward(OP, conv_norm_act, inputs)
            assert hia_kernels.last_backend(OP) == expected, (side, kernel, stride)
            packed_call(inputs)
            assert hia_kernels.last_backend(OP) == "native"
    refused = [
        (make_inputs((8, 8), F32), "native: channels must be multiples of 32, got 16 and 24"),
        (make_inputs((8, 8), torch.bfloat16, **WIDE), "native: bfloat16 is left to others"),
    ]
    for inputs, reason in refused:
        with pytest.raises(NotImplementedError, match=reason):
            conv_norm_act(**inputs)
    inputs = make_inputs((8, 8), F32, kernel=1, **WIDE)
    with pytest.raises(NotImplementedError, match="gradients are for 3 x 3 with stride 1"):
        forward_backward(OP, conv_norm_act, inputs)


PRODUCTS = {  # images, side, channels, stride: who serves forward and backward, with GELU too, which computes it again
    "few-pixels": (8, 3, (2048, 2048), 1, ("native", "native"), ("native", "native")),
    "few-pixels-of-a-stride": (8, 6, (2048, 2048), 2, ("native", "cpu"), ("native", "native")),
    "gradient-alone": (2, 28, (256, 512), 1, ("cpu", "native"), ("cpu", "native")),
    "no-multiple-of-32": (8, 3, (2047, 2047), 1, ("native", "native"), ("native", "native")),
    "narrow": (8, 3, (2048, 31), 1, ("cpu", "cpu"), ("cpu", "cpu")),
}


@pytest.mark.parametrize(
    ("images", "side", "channels", "stride", "served", "with_gelu"), PRODUCTS.values(), ids=PRODUCTS
)
def test_large_products_of_1x1(images, side, channels, stride, served, with_gelu, monkeypatch):
    """Serve large products of oneDNN's row by the extension, whose row it then is."""
    extension, called = torch.ops.hia_native.linear, []
    monkeypatch.setattr(torch.ops.hia_native, "linear", lambda *args: called.append(1) or extension(*args))
    options = {"kernel": 1, "images": images, "channels": channels, "stride": stride}
    for activation, expected in (("none", served), ("gelu", with_gelu)):
        inputs = make_inputs((side, side), F32, activation=activation, **options)
        leaves = {name: inputs[name].requires_grad_() for name in ("x", "weight")}
        found = []
        with hia_kernels.use_backend("auto"):
            called.clear()
            out = conv_norm_act(**inputs)
            found.append(hia_kernels.last_backend(OP))
            assert bool(called) == (found[0] == "native")
            called.clear()
            torch.autograd.grad(out.sum(), tuple(leaves.values()))
            found.append(hia_kernels.last_backend(OP))
            assert bool(called) == (found[1] == "native")
        assert tuple(found) == expected
        for name in leaves:
            inputs[name] = inputs[name].detach()
        with hia_kernels.use_backend("cpu"):
            called.clear()
            forward_backward(OP, conv_norm_act, inputs)
            assert not called
        if expected == ("native", "native"):
            got = forward_backward(OP, conv_norm_act, inputs)
            assert hia_kernels.last_backend(OP) == "native"
            truth = expect(conv_norm_act_ref, inputs, differentiable(OP), dtype=F32)
            assert not any(truth.problem(name, got[name]) for name in ("out", "dx"))  # what the products make


def test_packed_ops_are_registered():
    inputs = make_inputs((5, 4), F32, residual=True, **WIDE)
    packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"])
    x, residual = inputs["x"], inputs["residual"].contiguous()
    arguments = (x, packed.layout(5, 4), inputs["shift"])
    for mode in (True, False):
        fitting = residual if mode else residual[:, 1:-1]
        torch.library.opcheck(torch.ops.hia.conv_norm_act_packed.default, (*arguments, fitting, 1, "relu", mode))
    for function in (torch.ops.hia.conv_norm_act_packed_, torch.ops.hia.conv_norm_act_packed_out):
        torch.library.opcheck(function.default, (residual, *arguments, 1, "relu", True))
    count = 2 * 2 * 5 * 4 * 64 * 32 * 9  # the convolution's, not the form's
    assert flops_by_op(lambda: conv_norm_act_packed(x, packed)) == {"hia.conv_norm_act_packed": count}
    assert flops_by_op(lambda: conv_norm_act_packed_out(residual, x, packed)) == {"hia.conv_norm_act_packed_out": count}


def test_a_plain_weight_is_not_taken_for_a_packed_one():
    inputs = make_inputs((8, 8), F32, **WIDE)
    with pytest.raises(NotImplementedError, match="native: the weight is not packed for the native kernels"):
        torch.ops.hia.conv_norm_act_packed(inputs["x"], inputs["weight"], inputs["shift"], None, 1, "relu", True)
    packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"]).layout(8, 8)
    with hia_kernels.use_backend("cpu"), pytest.raises(NotImplementedError, match="cpu: the weight is packed for the"):
        torch.ops.hia.conv_norm_act_packed(inputs["x"], packed, inputs["shift"], None, 1, "relu", True)


def test_native_functions_check_their_arguments():
    ops, x, weight = torch.ops.hia_native, torch.randn(1, 6, 5, 32), torch.randn(32, 32, 3, 3)
    points, taps, out = torch.empty(32, 32, 16), torch.empty(32, 32, 9), torch.empty(1, 6, 5, 32)
    calls = [
        (lambda: ops.conv_winograd_weight(weight[:31].clone(), None, False, points), "outputs must be a multiple of"),
        (lambda: ops.conv_winograd_weight(weight, torch.ones(3), False, points), "scale must have 32 entries, got"),
        (lambda: ops.conv_direct_weight(weight, None, False, points), r"out must have shape \[32, 32, 9\]"),
        (lambda: ops.conv_winograd(x.double(), points, None, None, True, True, out), "x must be float32 on the CPU"),
        (lambda: ops.conv_winograd(x, weight, None, None, True, True, out), "weight must be of conv_winograd_weight"),
        (lambda: ops.conv_winograd(x, points, None, None, False, True, out), r"out must have shape \[1, 4, 5, 32\]"),
        (lambda: ops.conv_direct(x, weight, None, None, 1, True, True, out), "weight must be of conv_direct_weight"),
        (lambda: ops.conv_direct(x, taps, None, x[:, :4], 1, True, True, out), "residual must have shape"),
        (lambda: ops.conv_direct(x[:, :, ::2], taps, None, None, 1, True, True, out), "x must be contiguous"),
        (lambda: ops.conv_winograd_weight_gradient(out[:, 1:], x, weight), "dout must have shape"),
    ]
    for call, message in calls:
        with pytest.raises(RuntimeError, match=f"hia::conv_norm_act: {message}"):
            call()


@pytest.mark.parametrize(("kernel", "reach"), [(1, 0), (3, 1)])
def test_nan_stays_near_its_pixel(kernel, reach):
    """Spread NaN no further than the direct algorithm, though Winograd's tiles are shared by more outputs."""
    inputs = make_inputs((12, 12), F32, kernel=kernel, images=1, **WIDE)
    for row, column in ((6, 6), (5, 6), (5, 5)):
        x = inputs["x"].clone()
        x[0, row, column, 3] = torch.nan
        seen = conv_norm_act_packed(x, pack_conv(inputs["weight"], inputs["scale"], inputs["shift"])).isnan()
        area = slice(row - reach, row + reach + 1), slice(column - reach, column + reach + 1)
        assert seen[0, area[0], area[1]].all()
        seen[0, area[0], area[1]] = False
        assert not seen.any()


def test_no_images():
    inputs = make_inputs((6, 5), F32, images=0, **WIDE)
    packed = pack_conv(inputs["weight"], inputs["scale"], inputs["shift"])
    assert conv_norm_act_packed(inputs["x"], packed).shape == (0, 6, 5, 64)


PROBE = """
import torch
from hia_kernels.core import native
assert native.cpu_unavailable_reasons() == [], native.cpu_unavailable_reasons()
assert torch.ops.hia_native.cpu_isa() == "avx2"
import pytest, sys
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", __FILE__, "-k", "any_size or any_gradient or many_tiles"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    extension.unavailable_reasons() != () or torch.ops.hia_native.cpu_isa() != "avx512",
    reason="no AVX-512 here, so AVX2 is what the other tests have tested",
)
def test_avx2_where_there_is_more(monkeypatch):
    monkeypatch.setenv("HIA_CPU_ISA", "avx2")
    code = PROBE.replace("__FILE__", repr(__file__))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (1, 2)])
def test_borders_and_residual_are_the_references(kernel, stride):
    """Compare at one odd size: the tests above compare native algorithms with each other, or draw their sizes."""
    inputs = make_inputs((9, 13), F32, kernel=kernel, stride=stride, residual=True, **WIDE)
    assert_forward_matches(lambda given: conv_norm_act(**given), inputs)
    assert_forward_matches(packed_call, inputs)
