"""Triton kernels of ``hia::conv_norm_act``, in the interpreter."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hia_kernels
from hia_kernels import conv_norm_act, last_backend, use_backend
from hia_kernels.core import triton_support, tuning
from hia_kernels.ops.conv_norm_act.reference import conv_norm_act_bwd_ref, conv_norm_act_ref
from hia_kernels.testing import analysed, assert_close, bounded
from tests.inputs import inputs_of
from tests.ops.harness import DTYPES, assert_matches, assert_repeatable, forward_backward, opcheck

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
triton_fwd = pytest.importorskip("hia_kernels.ops.conv_norm_act.triton_fwd")
triton_tiles = pytest.importorskip("hia_kernels.ops.conv_norm_act.triton_tiles")
triton_candidates = pytest.importorskip("hia_kernels.ops.conv_norm_act.triton_candidates")
triton_bwd = pytest.importorskip("hia_kernels.ops.conv_norm_act.triton_bwd")
pytestmark = pytest.mark.interpreter

OP = "conv_norm_act"
make_inputs = inputs_of(OP)
CASES = [
    pytest.param((9, 12), {"kernel": 1, "activation": "none"}, id="1x1-none"),
    pytest.param((9, 13), {"residual": True}, id="3x3-relu-residual"),
    pytest.param((7, 11), {"stride": 2, "activation": "gelu", "residual": True, "nchw": True}, id="3x3-s2-gelu-odd"),
    pytest.param((10, 7), {"kernel": 1, "stride": 2, "channels": (13, 5)}, id="1x1-s2-ragged-channels"),
    pytest.param((32, 20), {"images": 1, "channels": (3, 70), "activation": "gelu"}, id="several-tiles"),
    pytest.param((6, 9), {"channels": (32, 16), "residual": True}, id="3x3-channels-fill-blocks"),
    pytest.param((9, 6), {"kernel": 1, "channels": (64, 32), "residual": True}, id="1x1-channels-fill-blocks"),
    pytest.param((5, 7), {"stride": 2, "channels": (32, 40)}, id="3x3-s2-input-channels-fill-blocks"),
    pytest.param((1, 1), {"images": 1, "residual": True}, id="one-pixel"),
    pytest.param((17, 1), {"stride": 2, "channels": (1, 1)}, id="one-wide-one-channel"),
    pytest.param((8, 8), {"images": 0, "residual": True}, id="no-images"),
]
SPLIT = {"images": 2, "channels": (160, 20), "residual": True}  # 9 taps of 3 chunks: 27 steps, 4 shares of 7, 7, 7, 6


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


def blocks_become(monkeypatch, **changes):
    """Replace the heuristic's meta-parameters; return the list of what it had chosen."""
    chosen = []

    def pick(op, key, device, heuristic):
        chosen.append(dict(heuristic))
        return {**heuristic, **{name: value for name, value in changes.items() if name in heuristic}}

    monkeypatch.setattr(tuning, "pick", pick)
    return chosen


@pytest.mark.parametrize(("size", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(size, options, dtype, triton_device):
    assert_matches(OP, conv_norm_act, conv_norm_act_ref, make_inputs(size, dtype, triton_device, **options), dtype)
    assert last_backend(OP) == "triton"


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_split_sums(activation, triton_device, monkeypatch):
    """Take few pixels and many steps: the heuristic splits the sums, in every dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        chosen = blocks_become(monkeypatch)
        inputs = make_inputs((5, 4), dtype, triton_device, activation=activation, **SPLIT)
        out, plain = conv_norm_act(**inputs), conv_norm_act_ref(**inputs)
        assert [blocks["SPLITS"] for blocks in chosen] == [8 if dtype == torch.float32 else 4]
        assert_close("out", out, conv_norm_act_ref(**analysed(inputs, dtype)), plain, dtype=dtype)
    assert last_backend(OP) == "triton"


def test_a_split_may_get_nothing(triton_device, monkeypatch):
    """Use a tuned configuration with more splits than steps."""
    blocks_become(monkeypatch, SPLITS=8, BLOCK_M=16, BLOCK_OC=16)
    inputs = make_inputs((5, 9), torch.float32, triton_device, kernel=1, channels=(40, 20), residual=True)
    exact, plain = conv_norm_act_ref(**analysed(inputs, torch.float32)), conv_norm_act_ref(**inputs)
    assert_close("out", conv_norm_act(**inputs), exact, plain, dtype=torch.float32)


def test_small_blocks(triton_device, monkeypatch):
    """Run several tiles along every axis, forward and backward, with edges that do not fill them."""
    blocks_become(monkeypatch, BLOCK_M=16, BLOCK_OC=16, BLOCK_C=16)
    for options in ({"stride": 2, "residual": True}, {"activation": "gelu", "kernel": 1}):
        inputs = make_inputs((9, 7), torch.float32, triton_device, channels=(37, 35), **options)
        assert_matches(OP, conv_norm_act, conv_norm_act_ref, inputs, torch.float32)


@pytest.mark.parametrize("changes", [{"IN_L1": 1}, {"num_stages": 3}, {"num_warps": 8}], ids=str)
def test_what_changes_no_bit(changes, triton_device, monkeypatch):
    """Copy x through L1, or with other stages and warps: the sums keep their order."""
    inputs = make_inputs((9, 7), torch.bfloat16, triton_device, channels=(64, 40), residual=True)
    usual = conv_norm_act(**inputs)
    chosen = blocks_become(monkeypatch, **changes)
    assert torch.equal(conv_norm_act(**inputs), usual)
    assert set(changes) <= set(chosen[0])


def test_tiles_follow_the_work():
    """Take wide tiles where L2 is the limit, splits where few tiles have long sums, small tiles for one step."""
    device = torch.device("cpu")

    def chosen(pixels, c, oc, kernel, **options):
        blocks = triton_tiles.block_sizes(pixels, c, oc, kernel, 2, device, max_splits=8, **options)
        return tuple(blocks[name] for name in ("BLOCK_M", "BLOCK_OC", "SPLITS"))

    assert chosen(112 * 112, 256, 256, 3, narrow=False) == (128, 256, 1)
    assert chosen(112 * 112, 256, 256, 3) == (128, 128, 1)
    assert chosen(28 * 28, 512, 512, 3)[2] > 1
    assert chosen(224 * 224, 64, 256, 1, narrow=False) == (128, 64, 1)
    assert triton_tiles.block_sizes(28 * 28, 512, 512, 3, 2, device)["SPLITS"] == 1
    assert chosen(1, 1, 1, 3) == (64, 16, 1)


def test_candidates_are_configurations(triton_device, monkeypatch):
    """Name what a launch takes, at most seven for a key, with as much shared memory as there is."""
    chosen = blocks_become(monkeypatch)
    conv_norm_act(**make_inputs((2, 2), torch.bfloat16, triton_device))
    assert set(triton_candidates.NAMES) == set(chosen[0])
    for key, configurations in triton_candidates.CANDIDATES.items():
        assert re.fullmatch(r"fwd-k[13]s[12]-px\d+-c\d+-oc\d+-b?float16", key)
        assert len(configurations) <= 7
        for config in configurations:
            staged = (config["BLOCK_M"] + config["BLOCK_OC"]) * config["BLOCK_C"] * 2 * config["num_stages"]
            assert staged <= 227 * 1024, f"{key}: {config}"  # bytes of shared memory of a block on sm_90


def test_backward_masks(triton_device):
    """Compute only what is asked for, from any strides."""
    for activation in ("none", "relu", "gelu"):
        inputs = make_inputs((5, 4), torch.float32, triton_device, activation=activation, residual=True)
        out = conv_norm_act_ref(**inputs)
        x, weight, scale, shift, residual, *options = inputs.values()
        dout = torch.randn(5, 4, 24, 2, device=triton_device).permute(3, 0, 1, 2)
        arguments = (dout, x, weight, scale, shift, residual, out, *options)
        exact_arguments = [bounded(a, torch.float32) if isinstance(a, torch.Tensor) else a for a in arguments]
        for mask in (
            [False, False, False, False, True],
            [True, False, False, True, False],
            [False, True, True] + [False] * 2,
        ):
            got = torch.ops.hia.conv_norm_act_bwd(*arguments, mask)
            plain, exact = conv_norm_act_bwd_ref(*arguments, mask), conv_norm_act_bwd_ref(*exact_arguments, mask)
            for name, *grads in zip(("dx", "dweight", "dscale", "dshift", "dresidual"), got, exact, plain):
                assert_close(f"{activation} {name}", *grads, dtype=torch.float32, slack=4)
    assert last_backend(OP) == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_dscale_out_of_the_weight_s_gradient(activation, dtype, triton_device, monkeypatch):
    """Recompute y for gelu alone in 16 bits, where the weight's gradient is wanted; results share no memory."""
    keys, pick = [], tuning.pick
    monkeypatch.setattr(tuning, "pick", lambda op, key, *rest: keys.append(key) or pick(op, key, *rest))
    inputs = make_inputs((6, 5), dtype, triton_device, activation=activation, residual=True, images=1)
    inputs["scale"][::3] = 0
    out = conv_norm_act_ref(**inputs)
    x, weight, scale, shift, residual, *options = inputs.values()
    dout = torch.randn(out.shape, device=triton_device).bfloat16().to(dtype)
    arguments = (dout, x, weight, scale, shift, residual, out, *options)
    exact_arguments = [bounded(a, dtype) if isinstance(a, torch.Tensor) else a for a in arguments]
    for mask in ([True, True, True, True, True], [False, True, True, False, False], [True, False, True, True, True]):
        keys.clear()
        got = torch.ops.hia.conv_norm_act_bwd(*arguments, mask)
        by_weight = mask[1] and activation != "gelu" and dtype != torch.float32
        assert [key.startswith("bwd-y") for key in keys] == [not by_weight]
        plain, exact = conv_norm_act_bwd_ref(*arguments, mask), conv_norm_act_bwd_ref(*exact_arguments, mask)
        for name, *grads in zip(("dx", "dweight", "dscale", "dshift", "dresidual"), got, exact, plain, strict=True):
            assert grads[0].dtype == grads[2].dtype and grads[0].is_contiguous()
            assert_close(f"{name} of {mask}", *grads, dtype=dtype, slack=4)
        owned = {grad.untyped_storage().data_ptr() for grad in (*got, dout, out) if grad.numel()}
        assert len(owned) == sum(mask) + 2
    assert last_backend(OP) == "triton"


@pytest.mark.parametrize("op", ["conv_norm_act", "stem"])
def test_gradients_never_use_tf32(op, triton_device, monkeypatch):
    """Turn TF32, PyTorch's default, off inside and restore it afterwards."""
    inputs = make_inputs((9, 7), torch.float32, triton_device)
    if op == "stem":
        inputs = inputs_of("stem")((16, 17), torch.float32, triton_device)
    original, seen = torch.ops.aten.convolution_backward, []

    def watched(*args):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.conv.fp32_precision))
        return original(*args)

    monkeypatch.setattr(torch.ops.aten, "convolution_backward", watched)
    torch.backends.cudnn.allow_tf32 = True  # the next test's fixture turns it off
    forward_backward(op, getattr(hia_kernels, op), inputs)
    assert last_backend(op) == "triton"
    assert seen == [(False, "ieee")]
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("options", [{"kernel": 1}, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_has_the_same_bits_in_any_batch(options, dtype, triton_device):
    inputs = make_inputs((9, 7), dtype, triton_device, **{**options, "images": 3})
    together = conv_norm_act(**inputs)
    for image in range(3):
        alone = {
            name: x[image : image + 1] for name, x in inputs.items() if name in ("x", "residual") and x is not None
        }
        assert torch.equal(conv_norm_act(**{**inputs, **alone})[0], together[image])


def test_nan_in_another_image_does_not_leak(triton_device):
    inputs = make_inputs((9, 7), torch.float32, triton_device, images=2, residual=True)
    dirty = inputs["x"].clone()
    dirty[0] = float("nan")
    out = conv_norm_act(**{**inputs, "x": dirty})
    assert torch.equal(out[1], conv_norm_act(**inputs)[1]) and out[0].isnan().all()


@pytest.mark.parametrize("kernel", [1, 3])
def test_nan_around_a_crop_does_not_leak(kernel, triton_device):
    """Take x, weights and residual as views of larger tensors that hold NaN elsewhere; their rows have gaps."""
    inputs = make_inputs((6, 5), torch.float32, triton_device, kernel=kernel, channels=(13, 11), residual=True)
    clean = conv_norm_act(**inputs)

    def framed(x):
        wide = torch.full([side + 3 for side in x.shape], float("nan"), device=x.device)
        return wide[1:-2, 1:-2, 1:-2, 1:-2].copy_(x)

    weight = framed(inputs["weight"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # channels last
    crops = {"x": framed(inputs["x"]), "residual": framed(inputs["residual"]), "weight": weight}
    assert torch.equal(conv_norm_act(**{**inputs, **crops}), clean)


def test_two_runs_are_bit_identical(triton_device):
    assert_repeatable(OP, conv_norm_act, make_inputs((9, 13), torch.float32, triton_device, residual=True))


def test_opcheck(triton_device):
    inputs = make_inputs((4, 3), torch.float32, triton_device, channels=(3, 6), activation="gelu", residual=True)
    opcheck(OP, torch.ops.hia.conv_norm_act.default, inputs)


def test_fp64_is_left_to_the_reference(triton_device):
    inputs = make_inputs((4, 3), torch.float64, triton_device)
    with pytest.raises(NotImplementedError, match="triton: float64 is left to the reference"):
        conv_norm_act(**inputs)


def test_grids_of_large_batches(monkeypatch):
    """Launch billions of pixels, though axes y and z of a grid end at 65,535; meta tensors, nothing is computed."""
    grids = {}

    def record(module, name):
        class Kernel:
            def __getitem__(self, grid):
                grids[name] = grid
                return lambda *args, **kwargs: None

        monkeypatch.setattr(module, name, Kernel())

    record(triton_fwd, "_conv_norm_act_fwd_kernel")
    record(triton_fwd, "_conv_norm_act_reduce_kernel")
    record(triton_bwd, "_conv_norm_act_bwd_kernel")
    norm = (torch.empty(16, device="meta"),) * 2
    for shape in ((2**20, 8, 8, 512), (1, 2**15, 2**15, 512)):
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(16, 512, 3, 3, dtype=torch.bfloat16, device="meta")
        out = triton_fwd.conv_norm_act_fwd(x, weight, *norm, None, 1, "relu")
        triton_bwd.conv_norm_act_bwd(out, x, weight, *norm, None, out, 1, "relu", [False, False, True, True, True])
    assert len(grids) == 3
    for name, grid in grids.items():
        assert grid[0] < 2**31 and all(side <= 65_535 for side in grid[1:]), name


def _large_inputs(images, size, **options):
    """Draw bf16 on the GPU, more than 2**31 elements of x."""
    inputs = make_inputs((4, 4), torch.bfloat16, "cuda", channels=(64, 64), images=1, **options)
    inputs["x"] = torch.randn(images, *size, 64, dtype=torch.bfloat16, device="cuda")
    if inputs["residual"] is not None:
        out_size = [(side - 1) // inputs["stride"] + 1 for side in size]
        inputs["residual"] = torch.randn(images, *out_size, 64, dtype=torch.bfloat16, device="cuda")
    assert inputs["x"].numel() > 2**31
    return inputs


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("options", [{"kernel": 1}, {"residual": True}], ids=["1x1", "3x3-residual"])
def test_more_elements_than_32_bits_count(options):
    """Compare the last image's bits in the batch, where its offsets need 64 bits, with those it has alone."""
    inputs = _large_inputs(2**31 // (256 * 256 * 64) + 1, (256, 256), **options)
    last = {name: x[-1:] for name, x in inputs.items() if name in ("x", "residual") and x is not None}
    assert torch.equal(conv_norm_act(**inputs)[-1:], conv_norm_act(**{**inputs, **last}))


@pytest.mark.gpu
@pytest.mark.slow
def test_an_image_of_more_elements_than_32_bits_count():
    """Compare the last rows of one image with a crop of them alone (other blocks, so to rounding)."""
    inputs = _large_inputs(1, (8200, 4096), kernel=1)
    crop = {**inputs, "x": inputs["x"][:, -4:]}
    exact, plain = conv_norm_act_ref(**analysed(crop, torch.bfloat16)), conv_norm_act_ref(**crop)
    assert_close("out", conv_norm_act(**inputs)[:, -4:], exact, plain, dtype=torch.bfloat16)


@settings(max_examples=10, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(3, 12)),
    channels=st.tuples(st.integers(4, 40), st.integers(8, 40)),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    images=st.integers(1, 2),
    activation=st.sampled_from(["none", "relu", "gelu"]),
    dtype=st.sampled_from(DTYPES),
    residual=st.booleans(),
)
def test_any_shape(size, dtype, **options):
    if triton_support.interpreted():
        assert_matches(OP, conv_norm_act, conv_norm_act_ref, make_inputs(size, dtype, **options), dtype)
