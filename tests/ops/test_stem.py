"""``hia::stem``."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hia_kernels import stem, use_backend
from hia_kernels.ops.stem.reference import stem_bwd_ref, stem_ref
from hia_kernels.testing import FP64_SLACK, analysed, assert_close
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
    opcheck,
)

OP = "stem"
make_inputs = inputs_of(OP)
U16, F16, BF16, F32 = torch.uint16, torch.float16, torch.bfloat16, torch.float32
CASES = [  # size, options, dtype of the weights; the dtypes rotate over the pixels' axes
    pytest.param((37, 53), {}, F32, id="uint8-grey-odd-fp32"),
    pytest.param((37, 53), {}, F16, id="uint8-grey-odd-fp16"),
    pytest.param((37, 53), {}, BF16, id="uint8-grey-odd-bf16"),
    pytest.param((32, 48), {"channels": 3}, BF16, id="uint8-rgb-even"),
    pytest.param((41, 30), {"pixel_dtype": U16, "channels": 3}, F32, id="uint16-rgb"),
    pytest.param((41, 30), {"pixel_dtype": U16}, F16, id="uint16-grey"),
    pytest.param((19, 22), {"pixel_dtype": F16, "kernel": 3}, F32, id="fp16-grey-3x3"),
    pytest.param((19, 22), {"pixel_dtype": F16, "kernel": 3}, BF16, id="fp16-grey-3x3-bf16"),
    pytest.param((18, 23), {"pixel_dtype": F32, "channels": 3, "pool": 1}, F32, id="fp32-rgb-no-pool"),
    pytest.param((18, 23), {"pixel_dtype": F32, "channels": 3, "pool": 1}, F16, id="fp32-rgb-no-pool-fp16"),
    pytest.param((11, 11), {"pixel_dtype": U16, "images": 1}, F32, id="smallest-image"),
    pytest.param((16, 16), {"images": 0}, F32, id="no-images"),
    pytest.param((3072, 3056), {"pixel_dtype": U16, "out_channels": 64}, F32, id="3072-px", marks=pytest.mark.gpu),
    pytest.param((3072, 3056), {"pixel_dtype": U16, "out_channels": 64}, BF16, id="3072-bf16", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("size", "options", "dtype"), CASES)
def test_matches_reference(size, options, dtype, device):
    assert_matches(OP, stem, stem_ref, make_inputs(size, dtype, device, **options), dtype)


def test_strided_pixels(device):
    """Take a crop of a planar image: no dim is contiguous with the next."""
    inputs = make_inputs((37, 53), torch.float32, device, pixel_dtype=torch.float32, channels=3)
    planar = torch.zeros(2, 3, 45, 60, device=device)
    planar[:, :, 3:40, 5:58] = inputs["pixels"].permute(0, 3, 1, 2)
    strided = {**inputs, "pixels": planar[:, :, 3:40, 5:58].permute(0, 2, 3, 1)}
    assert torch.equal(stem(**strided), stem(**inputs))
    opcheck(OP, torch.ops.hia.stem.default, strided)
    assert_matches(OP, stem, stem_ref, strided, torch.float32)


@pytest.mark.parametrize(("channels", "pool"), [(1, 3), (3, 1)])
def test_backward_is_autograd_of_reference(channels, pool, device):
    options = {"pixel_dtype": torch.float64, "channels": channels, "pool": pool}
    inputs = make_inputs((23, 18), torch.float64, device, **options)
    assert_backward_is_autograd_of_reference(OP, stem, stem_ref, inputs)


def test_agrees_with_pytorch_modules(device):
    """Check the reference against ResNet's stem, batch-norm not folded, on images normalised beforehand."""
    inputs = make_inputs((37, 53), torch.float64, device, images=1, channels=3)
    conv = torch.nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False, device=device, dtype=torch.float64)
    norm = torch.nn.BatchNorm2d(8, device=device, dtype=torch.float64).eval()
    norm.running_var -= norm.eps  # together 1: an eps of 0 is an error on some devices and versions
    conv.weight.data, norm.weight.data, norm.bias.data = inputs["weight"], inputs["scale"], inputs["shift"]
    low, high = inputs["window"][0].tolist()
    images = (inputs["pixels"].double().clamp(low, high) - low) / (high - low)
    images = (images - inputs["mean"].double()) / inputs["std"].double()
    network = torch.nn.Sequential(conv, norm, torch.nn.ReLU(), torch.nn.MaxPool2d(3, stride=2, padding=1))
    expected = network(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach()
    assert_close("out", stem(**inputs), expected, expected, dtype=torch.float64, slack=FP64_SLACK)


@pytest.mark.parametrize(("channels", "pool"), [(1, 3), (3, 1)])
def test_gradcheck(channels, pool):
    options = {"pixel_dtype": torch.float64, "images": 1, "channels": channels, "out_channels": 2}
    assert_gradcheck(OP, stem, make_inputs((8, 7), torch.float64, kernel=3, pool=pool, **options))


def test_opcheck(device):
    for pixel_dtype, pool in ((torch.uint8, 3), (torch.uint16, 1), (torch.float32, 3)):
        inputs = make_inputs((17, 16), torch.float32, device, pixel_dtype=pixel_dtype, pool=pool)
        opcheck(OP, torch.ops.hia.stem.default, inputs)
    dout = torch.randn(2, 8, 4, 5, device=device).permute(0, 3, 2, 1)
    for mask in ([True] * 4, [False, False, True, True], [False, True, False, False]):
        torch.library.opcheck(torch.ops.hia.stem_bwd.default, (dout, *inputs.values(), mask))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend, device):
    assert_compiles(OP, stem, make_inputs((17, 16), torch.float32, device, pixel_dtype=torch.uint16), backend)


def test_exports(device):
    assert_exports(stem, make_inputs((17, 16), torch.float32, device))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype, device):
    inputs = make_inputs((17, 16), torch.float32, device, pixel_dtype=torch.float32)
    assert_autocast(OP, stem, inputs, dtype, cast=("weight",), out_dtype=dtype)
    for name in ("window", "mean", "std", "scale", "shift"):  # a 12-bit window does not survive fp16
        message = f"^hia::stem: {name} must be float32( beside .*)?, got {str(dtype).removeprefix('torch.')}"
        with torch.autocast(device, dtype=dtype), pytest.raises(TypeError, match=message):
            stem(**{**inputs, name: inputs[name].to(dtype)})


def test_flops():
    for channels in (1, 3):
        inputs = make_inputs((17, 16), torch.float32, channels=channels, pixel_dtype=torch.float32)
        forward = flops(stem_ref, **inputs)
        assert forward == 2 * 2 * 9 * 8 * 8 * 3 * 49
        assert flops_by_op(lambda inputs=inputs: stem(**inputs)) == {"hia.stem": forward}
        arguments = (torch.ones_like(stem(**inputs)), *inputs.values())
        for mask, products in (([True] * 4, 3), ([False, True, True, True], 2), ([False, False, False, True], 1)):
            backward = flops(stem_bwd_ref, *arguments, mask)
            assert backward == flops(torch.ops.hia.stem_bwd, *arguments, mask) == products * forward


def test_two_runs_are_bit_identical(device):
    assert_repeatable(OP, stem, make_inputs((65, 47), torch.float32, device, pixel_dtype=torch.float32))


def test_images_are_independent(device):
    inputs = make_inputs((37, 53), torch.float32, device, images=3)
    exact = stem_ref(**analysed(inputs, torch.float32))
    pairs = zip(inputs["pixels"].split(1), inputs["window"].split(1), strict=True)
    one_by_one = torch.cat([stem(**{**inputs, "pixels": pixels, "window": window}) for pixels, window in pairs])
    assert_close("out", one_by_one, exact, stem(**inputs), dtype=torch.float32)


def test_nan_in_another_image_does_not_leak(device):
    inputs = make_inputs((17, 16), torch.float32, device, pixel_dtype=torch.float32)
    dirty = inputs["pixels"].clone()
    dirty[0] = float("nan")
    assert torch.equal(stem(**{**inputs, "pixels": dirty})[1], stem(**inputs)[1])


def test_inverted_window_is_the_negative(device):
    """Invert the window, as MONOCHROME1 does: bright means dark."""
    inputs = make_inputs((37, 53), torch.float32, device, images=1)
    window = torch.tensor([[20.0, 235.0]], device=device)
    negative = {**inputs, "pixels": 255 - inputs["pixels"], "window": 255 - window}
    assert negative["window"][0, 0] > negative["window"][0, 1]
    assert torch.equal(stem(**negative), stem(**{**inputs, "window": window}))
    assert not torch.equal(stem(**{**inputs, "window": window.flip(1)}), stem(**{**inputs, "window": window}))


def test_grey_is_three_equal_channels(device):
    inputs = make_inputs((37, 53), torch.float32, device)
    three = {**inputs, "pixels": inputs["pixels"].expand(-1, -1, -1, 3)}
    exact, plain = stem_ref(**analysed(three, torch.float32)), stem_ref(**three)
    for given in (inputs, three):  # a backend may sum the weights of a grey image, which rounds differently
        assert_close("out", stem(**given), exact, plain, dtype=torch.float32)
    with use_backend("reference"):
        assert torch.equal(stem(**three), stem(**inputs))


def test_grey_is_one_channel_of_summed_weights(device):
    """Check the interior exactly: padding is zero after normalisation, so the mean's part varies along the border."""
    inputs = make_inputs((37, 53), torch.float64, device, images=1, pixel_dtype=torch.float64, pool=1)
    low, high = inputs["window"][0].double()
    p = ((inputs["pixels"] - low) / (high - low)).clamp(0, 1).permute(0, 3, 1, 2)
    std, mean = inputs["std"].double(), inputs["mean"].double()
    weight = inputs["weight"] / std[:, None, None]
    summed = weight.sum(1, keepdim=True)  # [OC, 1, K, K]
    of_mean = (weight * mean[:, None, None]).sum(1, keepdim=True)

    def finish(y):
        return F.relu(y.permute(0, 2, 3, 1) * inputs["scale"] + inputs["shift"])

    conv = F.conv2d(p, summed, stride=2, padding=3)
    constant = finish(conv - of_mean.sum((1, 2, 3))[:, None, None])
    exact = finish(conv - F.conv2d(torch.ones_like(p), of_mean, stride=2, padding=3))
    out = stem(**inputs)
    assert_close("everywhere", out, exact, exact, dtype=torch.float64, slack=FP64_SLACK)
    inside = (slice(None), slice(2, -2), slice(2, -2))
    assert_close("inside", out[inside], constant[inside], constant[inside], dtype=torch.float64, slack=FP64_SLACK)
    assert (out - constant).abs()[:, 0].max() > 1e-3


def radiograph_inputs(pixels, window, device):
    shape = (pixels.shape[0], pixels.shape[1])
    inputs = make_inputs((16, 16), torch.float32, device, images=1, out_channels=4)
    pixels = torch.from_numpy(pixels).reshape(1, *shape, -1).to(device)
    return {**inputs, "pixels": pixels, "window": torch.tensor([window], device=device)}


def assert_forward_matches(inputs):
    exact, plain = stem_ref(**analysed(inputs, torch.float32)), stem_ref(**inputs)
    assert_close("out", stem(**inputs), exact, plain, dtype=torch.float32)


@pytest.mark.parametrize("name", ["chest_p221_day02_ap_bd3ceeb6", "foot_lateral_normal"])
def test_real_radiographs(name, radiographs, device):
    image_module = pytest.importorskip("PIL.Image")
    path = next(path for path in radiographs if path.stem == name)
    with image_module.open(path) as image:
        pixels = np.array(image)
    assert min(pixels.shape[:2]) > 1000
    inputs = radiograph_inputs(pixels, (0.0, 255.0), device)
    if pixels.ndim == 2:
        assert_matches(OP, stem, stem_ref, inputs, torch.float32)
    else:  # the same, forward only: two large images' backward in fp64 would take as long as all the rest
        assert_forward_matches(inputs)


def test_real_16_bit_monochrome1(data_dir, device):
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(data_dir / "dicom" / "RG3_deflated.dcm")
    assert dataset.PhotometricInterpretation == "MONOCHROME1"
    pixels = dataset.pixel_array
    assert pixels.dtype == np.uint16
    assert_forward_matches(radiograph_inputs(pixels, (1023.0, 0.0), device))


WINDOW_ERRORS = [
    ((7.0, 7.0), r"window must hold two different finite values per image, got \(7.0, 7.0\) for image 1"),
    ((0.0, float("nan")), r"window must hold two different finite values per image, got \(0.0, nan\) for image 1"),
    ((float("-inf"), 0.0), r"window must hold two different finite values per image, got \(-inf, 0.0\) for image 1"),
]
ERRORS = [
    ({"pixels": torch.ones(16, 17, 1)}, ValueError, r"pixels must have shape \[N, IH, IW, CP\], got \[16, 17, 1\]"),
    ({"pixels": torch.ones(2, 16, 17, 1).int()}, TypeError, "pixels must be uint8 or uint16 or float32 .* got int32"),
    ({"pixels": np.ones((2, 16, 17, 1))}, TypeError, "pixels must be a tensor, got ndarray"),
    ({"pixels": torch.ones(2, 16, 17, 2)}, ValueError, "pixels' channels must be 1 or 3, got 2"),
    (
        {"pixels": torch.ones(2, 10, 17, 1)},
        ValueError,
        "pixels must be at least 11 x 11, the stem's reach, got 10 x 17",
    ),
    ({"pixels": torch.ones(2, 0, 17, 1)}, ValueError, "pixels must be at least 11 x 11, the stem's reach, got 0 x 17"),
    ({"window": torch.ones(2, 3)}, ValueError, r"window must have shape \[N, 2\], got \[2, 3\]"),
    (
        {"window": torch.ones(1, 2)},
        ValueError,
        r"window must have shape \[N, 2\], got \[1, 2\]; N=2 is fixed by pixels",
    ),
    ({"window": torch.ones(2, 2).double()}, TypeError, "window must be float32, got float64"),
    ({"mean": torch.ones(1)}, ValueError, r"mean must have shape \[3\], got \[1\]"),
    ({"mean": torch.ones(3).half()}, TypeError, "mean must be float32, got float16"),
    ({"std": torch.ones(4)}, ValueError, r"std must have shape \[3\], got \[4\]"),
    ({"std": torch.ones(3).half()}, TypeError, "std must be float32, got float16"),
    ({"weight": torch.ones(8, 1, 7, 7)}, ValueError, r"weight must have shape \[OC, 3, K, K\], got \[8, 1, 7, 7\]"),
    ({"weight": torch.ones(8, 3, 5, 5)}, ValueError, "weight's K must be 3 or 7, got 5"),
    ({"weight": torch.ones(8, 3, 7, 7).int()}, TypeError, "weight must be float32 or float16 or .* got int32"),
    ({"scale": torch.ones(7)}, ValueError, r"scale must have shape \[OC\], got \[7\]; OC=8 is fixed by weight"),
    ({"scale": torch.ones(8).double()}, TypeError, "scale must be float32 like weight, got float64"),
    ({"shift": torch.ones(7)}, ValueError, r"shift must have shape \[OC\], got \[7\]; OC=8 is fixed by weight"),
    ({"shift": torch.ones(8).half()}, TypeError, "shift must be float32 like weight, got float16"),
    ({"pool": 2}, ValueError, "pool must be 1 or 3, got 2"),
    ({"mean": torch.ones(3, device="meta")}, ValueError, "mean must be on cpu like pixels, got meta"),
]


def test_error_messages():
    inputs = make_inputs((16, 17), torch.float32)
    for change, error, message in ERRORS:
        with pytest.raises(error, match=f"^hia::stem: {message}"):
            stem(**{**inputs, **change})


@pytest.mark.parametrize("run", [stem, torch.compile(stem, backend="aot_eager", fullgraph=True)], ids=["", "compiled"])
def test_window_values_are_checked(run):
    inputs = make_inputs((16, 17), torch.float32)
    run(**inputs)
    for window, message in WINDOW_ERRORS:
        with pytest.raises(ValueError, match=f"^hia::stem: {message}"):
            run(**{**inputs, "window": torch.tensor([(0.0, 255.0), window])})


def test_no_gradient_of_gradients():
    inputs = make_inputs((16, 17), torch.float32)
    weight = inputs["weight"].detach().requires_grad_()
    out = stem(**{**inputs, "weight": weight})
    (dweight,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="hia::stem: gradients of gradients are not implemented"):
        dweight.sum().backward()
