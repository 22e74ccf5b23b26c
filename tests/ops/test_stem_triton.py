"""Triton kernels of ``hia::stem``, in the interpreter or on a GPU."""

import pytest
import torch

from hia_kernels import last_backend, stem, use_backend
from hia_kernels.core import tuning
from hia_kernels.ops.stem import library, pack_stem, packing_unsupported_reasons, stem_packed
from hia_kernels.ops.stem.reference import stem_bwd_ref, stem_ref
from hia_kernels.testing import analysed, assert_close, bounded, upcast
from tests.inputs import inputs_of
from tests.ops.harness import assert_matches, assert_repeatable, flops, opcheck

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
pytestmark = pytest.mark.interpreter

OP = "stem"
make_inputs = inputs_of(OP)
U16, F16, BF16, F32 = torch.uint16, torch.float16, torch.bfloat16, torch.float32
CASES = [  # size, options, dtype of the weights; the dtypes rotate over the pixels' axes
    pytest.param((19, 27), {"images": 1}, F32, id="uint8-grey-odd-fp32"),
    pytest.param((19, 27), {}, F16, id="uint8-grey-odd-fp16"),
    pytest.param((19, 27), {}, BF16, id="uint8-grey-odd-bf16"),
    pytest.param((32, 20), {"channels": 3, "images": 1}, BF16, id="uint8-rgb-even"),
    pytest.param((13, 70), {"pixel_dtype": U16, "channels": 3, "images": 1}, F32, id="uint16-rgb-two-tiles"),
    pytest.param((13, 30), {"pixel_dtype": U16, "images": 1}, F16, id="uint16-grey"),
    pytest.param((9, 13), {"pixel_dtype": F16, "kernel": 3}, F32, id="fp16-grey-3x3"),
    pytest.param((9, 13), {"pixel_dtype": BF16, "kernel": 3}, BF16, id="bf16-grey-3x3-bf16"),
    pytest.param((18, 23), {"pixel_dtype": F32, "channels": 3, "pool": 1, "images": 1}, F32, id="fp32-rgb-no-pool"),
    pytest.param((18, 23), {"pixel_dtype": F32, "pool": 1, "kernel": 3}, F16, id="fp32-grey-3x3-no-pool-fp16"),
    pytest.param((11, 11), {"pixel_dtype": U16, "images": 1, "out_channels": 70}, F32, id="smallest-image"),
    pytest.param((16, 16), {"images": 0}, F32, id="no-images"),
]


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


def blocks_become(monkeypatch, **changes):
    """Replace the heuristic's meta-parameters."""

    def pick(op, key, device, heuristic):
        return {**heuristic, **{name: value for name, value in changes.items() if name in heuristic}}

    monkeypatch.setattr(tuning, "pick", pick)


@pytest.mark.parametrize(("size", "options", "dtype"), CASES)
def test_matches_reference(size, options, dtype, triton_device):
    assert_matches(OP, stem, stem_ref, make_inputs(size, dtype, triton_device, **options), dtype)
    assert last_backend(OP) == "triton"


@pytest.mark.parametrize(
    ("channels", "pool", "rows", "kernel"),
    [(1, 3, 2, 3), (1, 3, 4, 3), (1, 3, 1, 7), (1, 1, 1, 3), (3, 3, 4, 3)],
)
def test_tiles_inside_and_along_the_borders(channels, pool, rows, kernel, triton_device, monkeypatch):
    """Run several programs along both axes; strips end inside and outside the image."""
    blocks_become(monkeypatch, ROWS=rows, BLOCK_R=2, BLOCK_Q=4)
    inputs = make_inputs((41, 43), F32, triton_device, channels=channels, images=1, kernel=kernel, pool=pool)
    inputs["mean"] = torch.tensor([0.9, 0.5, -0.7], device=triton_device)  # a wrong share of them would show
    inputs["scale"][::2] *= -1  # their pool is a minimum of the convolution
    exact, plain = stem_ref(**analysed(inputs, torch.float32)), stem_ref(**inputs)
    out = stem(**inputs)
    assert_close("out", out, exact, plain, dtype=F32)
    for name, dim, place in (("top", 1, 0), ("bottom", 1, -1), ("left", 2, 0), ("right", 2, -1)):
        assert_close(name, *(x.select(dim, place) for x in (out, exact, plain)), dtype=F32)


def test_backward_masks(triton_device):
    """Compute only what is asked for, from any strides; pixels of an integer dtype have no gradient."""
    for pixel_dtype, pool in ((F32, 3), (F32, 1), (torch.uint8, 3)):
        inputs = make_inputs((11, 9), F32, triton_device, pixel_dtype=pixel_dtype, pool=pool, kernel=3)
        out = stem_ref(**inputs)
        dout = torch.randn(*out.shape[::-1], device=triton_device).permute(3, 2, 1, 0)
        exact_arguments = [bounded(dout, F32), *analysed(inputs, torch.float32).values()]
        for mask in ([pixel_dtype == F32] + [False] * 3, [False, False, True, True], [False, True, False, False]):
            got = torch.ops.hia.stem_bwd(dout, *inputs.values(), mask)
            plain, exact = stem_bwd_ref(dout, *inputs.values(), mask), stem_bwd_ref(*exact_arguments, mask)
            for name, *grads in zip(("dpixels", "dweight", "dscale", "dshift"), got, exact, plain):
                assert_close(f"{name} of {mask}", *grads, dtype=F32, slack=4)
            assert len({grad.untyped_storage().data_ptr() for grad in got if grad.numel()}) == sum(mask)  # none shared
    assert last_backend(OP) == "triton"


def test_a_tie_goes_to_the_first(triton_device):
    """Tie every pooling window inside, by a constant image and weights of few bits; dpixels tells which got it."""
    inputs = make_inputs((15, 13), F32, triton_device, images=1, pixel_dtype=F32, kernel=3)
    inputs |= {"mean": torch.zeros(3, device=triton_device), "std": torch.ones(3, device=triton_device)}
    inputs |= {"pixels": inputs["pixels"].fill_(0.5), "window": torch.tensor([[0.0, 1.0]], device=triton_device)}
    inputs["weight"] = (inputs["weight"] * 8).round() / 8
    inputs["shift"] += 2
    dout = torch.randn(stem_ref(**inputs).shape, device=triton_device)
    got = torch.ops.hia.stem_bwd(dout, *inputs.values(), [True] * 4)
    plain = stem_bwd_ref(dout, *inputs.values(), [True] * 4)
    # not analysed: a maximum that a rounding decides is excused by the analysis, and these are none
    exact = stem_bwd_ref(dout.double(), *upcast(inputs, torch.float64).values(), [True] * 4)
    for name, *grads in zip(("dpixels", "dweight", "dscale", "dshift"), got, exact, plain):
        assert_close(name, *grads, dtype=F32, slack=4)


def test_strided_pixels(triton_device):
    """Take a crop of a planar image, with NaN around it."""
    inputs = make_inputs((9, 13), F32, triton_device, pixel_dtype=F32, channels=3, kernel=3)
    planar = torch.full((2, 3, 17, 20), float("nan"), device=triton_device)
    crop = planar[:, :, 3:12, 5:18]
    crop.copy_(inputs["pixels"].permute(0, 3, 1, 2))
    strided = {**inputs, "pixels": crop.permute(0, 2, 3, 1)}
    assert torch.equal(stem(**strided), stem(**inputs))
    assert_matches(OP, stem, stem_ref, strided, F32)


@pytest.mark.parametrize(("channels", "kernel"), [(1, 7), (3, 7), (1, 3)])
@pytest.mark.parametrize("pool", [1, 3])
def test_nan_reaches_as_far_as_in_the_reference(channels, kernel, pool, triton_device):
    """Spread no NaN by tiles of taps, which are two rows higher than the kernel."""
    options = {"pixel_dtype": F32, "channels": channels, "kernel": kernel, "pool": pool}
    inputs = make_inputs((22, 19), F16, triton_device, images=1, **options)
    for place in ((0, 0), (9, 8), (10, 9), (21, 18)):
        inputs["pixels"][0][place] = float("nan")
    inputs["pixels"][0, 15, 3] = float("inf")
    out, expected = stem(**inputs), stem_ref(**inputs)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any(-1).sum() < out[..., 0].numel()


@pytest.mark.parametrize(("channels", "pool", "dtype"), [(1, 3, F32), (1, 3, BF16), (3, 1, BF16)])
def test_an_image_has_the_same_bits_in_any_batch(channels, pool, dtype, triton_device):
    inputs = make_inputs((9, 11), dtype, triton_device, images=3, channels=channels, pool=pool, kernel=3)
    together = stem(**inputs)
    for image in range(3):
        alone = {name: inputs[name][image : image + 1] for name in ("pixels", "window")}
        assert torch.equal(stem(**{**inputs, **alone})[0], together[image])


def test_two_runs_are_bit_identical(triton_device):
    assert_repeatable(OP, stem, make_inputs((11, 13), F32, triton_device, pixel_dtype=F32, kernel=3))


def test_opcheck(triton_device):
    inputs = make_inputs((7, 8), F32, triton_device, pixel_dtype=U16, images=1, kernel=3, out_channels=4)
    opcheck(OP, torch.ops.hia.stem.default, inputs)


def test_what_is_left_to_the_reference(triton_device):
    inputs = make_inputs((12, 11), torch.float64, triton_device)
    with pytest.raises(NotImplementedError, match="triton: float64 is left to the reference"):
        stem(**inputs)
    inputs = make_inputs((12, 11), F32, triton_device, pixel_dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="triton: float64 is left to the reference"):
        stem(**inputs)
    pixels = torch.empty_strided((2, 12, 11, 1), (11, 2**23, 1, 1), dtype=torch.uint8, device="meta")
    reasons = library._triton_unsupported(OP, **{**make_inputs((12, 11), F32, triton_device), "pixels": pixels})
    assert "rows and columns of pixels must lie at most 4194304 elements apart, got (11, 8388608, 1, 1)" in reasons


def packed_of(inputs):
    return pack_stem(*(inputs[name] for name in ("weight", "mean", "std", "scale", "shift", "pool")))


@pytest.mark.parametrize(("kernel", "pool", "dtype"), [(7, 3, BF16), (7, 1, F16), (3, 3, F32)], ids=str)
def test_a_packed_weight_has_the_same_bits(kernel, pool, dtype, triton_device):
    """Pack once for grey images and others, of any pixels."""
    first = packed = None
    for channels, pixel_dtype in ((1, torch.uint8), (3, torch.uint8), (1, U16), (3, F32)):
        options = {"kernel": kernel, "pool": pool, "channels": channels, "pixel_dtype": pixel_dtype, "images": 1}
        inputs = make_inputs((11, 12), dtype, triton_device, **options)
        if first is None:
            inputs["scale"][::2] *= -1
            first, packed = inputs, packed_of(inputs)
        inputs = {**first, "pixels": inputs["pixels"], "window": inputs["window"]}
        assert packed.nbytes == 5 * (kernel + 1) ** 2 * inputs["scale"].numel() * dtype.itemsize
        with torch.no_grad():
            out = stem_packed(inputs["pixels"], inputs["window"], packed)
        assert torch.equal(out, stem(**inputs)) and last_backend(OP) == "triton"
    assert flops(stem_packed, inputs["pixels"], inputs["window"], packed) == flops(stem, **inputs)


def test_a_packed_weight_is_checked(triton_device):
    inputs = make_inputs((11, 12), F32, triton_device, pixel_dtype=F32)
    packed, pixels, window = packed_of(inputs), inputs["pixels"], inputs["window"]
    errors = [
        (ValueError, "pixels must be at least 11 x 11, the stem's reach, got 9 x 12", (pixels[:, :9], window)),
        (ValueError, r"window must have shape \[N, 2\], got \[1, 2\]; N=2 is fixed by pixels", (pixels, window[:1])),
        (ValueError, "pixels' channels must be 1 or 3, got 2", (pixels.expand(-1, -1, -1, 2), window)),
        (TypeError, "pixels must be uint8 .* got int32", (pixels.int(), window)),
        (
            RuntimeError,
            "pixels must not be part of a gradient graph, got requires_grad=True; use stem",
            (pixels.detach().requires_grad_(), window),
        ),
    ]
    for error, message, (some, windows) in errors:
        with pytest.raises(error, match=f"^hia::stem_packed: {message}"):
            stem_packed(some, windows, packed)
    with pytest.raises(
        NotImplementedError, match="hia::stem_packed: weight can't be packed: triton: float64 is left to"
    ):
        packed_of(make_inputs((11, 12), torch.float64, triton_device))
    with use_backend("reference"):
        assert packing_unsupported_reasons(inputs["weight"]) == ["reference: has no stem_pack"]
        assert packed.unsupported_reasons(pixels) == ["reference: has no stem_packed"]
    with torch.autocast(triton_device, dtype=BF16):
        assert packing_unsupported_reasons(inputs["weight"]) == packed.unsupported_reasons(pixels) == ["autocast is on"]


def test_opcheck_of_the_packed_op(triton_device):
    inputs = make_inputs((7, 8), F32, triton_device, pixel_dtype=U16, images=1, kernel=3, out_channels=4)
    packed = packed_of(inputs)
    torch.library.opcheck(
        torch.ops.hia.stem_packed.default,
        (inputs["pixels"], inputs["window"], packed.mean, packed.std, packed.taps, packed.scale, packed.shift, 3),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("pool", [1, 3])
def test_the_upper_half_of_16_bits(pool, triton_device):
    """Pass uint16 as int16; the 12-bit pixels of the cases above would not show it."""
    inputs = make_inputs((13, 15), F32, triton_device, pixel_dtype=U16, kernel=3, pool=pool)
    inputs["pixels"] = (65_000 + inputs["pixels"].int() % 101).to(U16)
    inputs["window"] = torch.tensor([[65_000.0, 65_100.0], [65_100.0, 65_000.0]], device=triton_device)
    assert_matches(OP, stem, stem_ref, inputs, F32)
    assert last_backend(OP) == "triton"
