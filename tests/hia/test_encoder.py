"""Folded weights, images of several sizes, real radiographs: the encoder against its plain parameters."""

from __future__ import annotations

import copy
import dataclasses
import io
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hia_kernels
from hia.encoder import memory
from hia.images.load import load_image
from tests.hia.encoders import WINDOW, distance, encoder_of, pixels_of

KINDS = {
    "resnet50": {},
    "released": {"encoder_bias": True},
    "strided": {"encoder": "strided"},
    "strided-16": {"encoder": "strided", "encoder_stride": 16},
}
each_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def reference_of(encoder, pixels, window=WINDOW):
    """Compute the plain implementation in fp64."""
    exact = copy.deepcopy(encoder).double()
    with hia_kernels.use_backend("reference"), torch.no_grad():
        return exact(pixels, window)


@each_kind
@pytest.mark.parametrize("channels", [1, 3])
def test_folded_is_the_same_encoder(changes, channels):
    encoder, pixels = encoder_of(**changes), pixels_of(75, 101, channels)
    exact = reference_of(encoder, pixels)
    with torch.no_grad():
        plain = encoder(pixels, WINDOW)
        folded = encoder.fold_weights()
        out = encoder(pixels, WINDOW)
    assert hia_kernels.last_backend("conv_norm_act") in ("cpu", "native") and hia_kernels.last_backend("stem") == "cpu"
    assert out.shape == (encoder.halved(75), encoder.halved(101), encoder.channels) and out.dtype == torch.float32
    assert distance(plain, exact) < 2e-6 and distance(out, exact) < 2e-6
    assert encoder.current() is folded and folded.nbytes > 0
    encoder.unfold_weights()
    with torch.no_grad():
        assert torch.equal(encoder(pixels, WINDOW), plain)


# resnet50's stem reaches over 11 pixels, strided's over 3; long and narrow, primes
NARROW = [(11, 1021), (997, 11), (13, 13), (127, 251)]
EXAMPLES = {
    "resnet50": ({}, 11, NARROW),
    "strided": ({"encoder": "strided"}, 3, [*NARROW, (3, 997), (1021, 3), (3, 3), (5, 7)]),
    "strided-16": ({"encoder": "strided", "encoder_stride": 16}, 3, [(3, 997), (1021, 3), (3, 3), (31, 53)]),
}
each_example = pytest.mark.parametrize(("changes", "smallest", "sizes"), EXAMPLES.values(), ids=EXAMPLES)


def check_size(changes, size, channels):
    encoder, pixels = encoder_of(encoder_width=4, **changes), pixels_of(*size, channels)
    exact = reference_of(encoder, pixels)
    assert exact.shape == (-(-size[0] // encoder.stride), -(-size[1] // encoder.stride), encoder.channels)
    with torch.no_grad():
        for run in (encoder, encoder.fold_weights() and encoder):
            assert distance(run(pixels, WINDOW), exact) < 2e-6


@each_example
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_size(changes, smallest, sizes, data):
    side = st.integers(smallest, 160)
    check_size(changes, data.draw(st.tuples(side, side)), data.draw(st.sampled_from([1, 3])))


@each_example
def test_narrow_and_prime_sizes(changes, smallest, sizes):
    assert encoder_of(**changes).smallest_side == smallest
    for number, size in enumerate(sizes):
        check_size(changes, size, (1, 3)[number % 2])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_folded_in_other_dtypes(dtype, bound):
    encoder, pixels = encoder_of().to(dtype), pixels_of(64, 90)
    exact = reference_of(encoder, pixels)
    encoder.fold_weights()
    with torch.no_grad():
        out = encoder(pixels, WINDOW)
    assert out.dtype == dtype and distance(out, exact) < bound


def test_folded_weights_are_no_state():
    encoder = encoder_of()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    keys, parameters = list(before), len(list(encoder.parameters()))
    encoder.fold_weights()
    with torch.no_grad():
        out = encoder(pixels_of(64, 64), WINDOW)
    assert list(encoder.state_dict()) == keys and len(list(encoder.parameters())) == parameters
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    torch.save(encoder.state_dict(), io.BytesIO())
    copied = copy.deepcopy(encoder)  # packed weights can't be copied: a copy starts without
    assert copied.current() is None and encoder.current() is not None
    with torch.no_grad():
        assert distance(copied(pixels_of(64, 64), WINDOW), out) < 2e-6


def step_of(encoder, pixels):
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-3)
    encoder(pixels, WINDOW).square().mean().backward()
    optimizer.step()


def test_training_after_fold_weights_sees_its_own_weights():
    encoder, other, pixels = encoder_of(), encoder_of(), pixels_of(64, 75)
    encoder.fold_weights()
    for trained in (encoder, other):
        step_of(trained.train(), pixels)
        assert all(p.grad is not None for p in trained.parameters())
        trained.eval()
    with torch.no_grad():
        expected = other(pixels, WINDOW)
        with pytest.warns(UserWarning, match="parameters have changed since fold_weights"):
            out = encoder(pixels, WINDOW)
        assert torch.equal(out, expected) and encoder.current() is None
        encoder.fold_weights()
        assert distance(encoder(pixels, WINDOW), expected) < 2e-6


CHANGES = {
    "in-place": lambda encoder: encoder.conv1.weight.mul_(2),
    "statistics": lambda encoder: encoder.layer2[0].bn2.running_var.mul_(2),
    "replaced": lambda encoder: setattr(encoder.layer1[0].bn3, "weight", nn.Parameter(torch.ones(32))),
    "loaded": lambda encoder: encoder.load_state_dict(encoder_of(seed=1).state_dict()),
    "cast": lambda encoder: encoder.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_ends_folded_weights(change):
    encoder, pixels = encoder_of(), pixels_of(64, 64)
    encoder.fold_weights()
    with torch.no_grad():
        encoder(pixels, WINDOW)
        change(encoder)
        with pytest.warns(UserWarning, match="parameters have changed since fold_weights"):
            out = encoder(pixels, WINDOW)
        assert distance(out, reference_of(encoder, pixels)) < 2e-6


def test_gradients_flow_past_folded_weights():
    encoder, pixels = encoder_of(), pixels_of(48, 64)
    expected = torch.autograd.grad(encoder(pixels, WINDOW).square().mean(), list(encoder.parameters()))
    encoder.fold_weights()
    found = torch.autograd.grad(encoder(pixels, WINDOW).square().mean(), list(encoder.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_folded_where_packed_weights_cant_serve():
    """Run the plain ops for another backend, autocast and the compiler, to the same features."""
    encoder, pixels = encoder_of(), pixels_of(64, 75)
    exact = reference_of(encoder, pixels)
    encoder.fold_weights()
    with torch.no_grad():
        with hia_kernels.use_backend("reference"):
            assert distance(encoder(pixels, WINDOW), exact) < 2e-6
        assert hia_kernels.last_backend("conv_norm_act") == "reference"
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder(pixels, WINDOW)
        assert out.dtype == torch.bfloat16 and distance(out, exact) < 3e-2
        compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
        assert distance(compiled(pixels, WINDOW), exact) < 2e-6


def test_many_are_each_alone_bit_for_bit():
    encoder = encoder_of()
    sizes = [(64, 64), (33, 90), (64, 64), (75, 41)]
    images = [pixels_of(*size, seed=seed) for seed, size in enumerate(sizes)]
    windows = torch.tensor([[0.0, 255.0], [255.0, 0.0], [10.0, 200.0], [0.0, 100.0]])
    for folded in (False, True):
        if folded:
            encoder.fold_weights()
        with torch.no_grad():
            together = encoder.forward_many(images, windows)
            alone = [encoder(image, window) for image, window in zip(images, windows, strict=True)]
            assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
            stacked = encoder._encode(torch.stack(images[::2]), windows[::2], encoder._executor(), None)
            assert distance(stacked[0], alone[0]) < 2e-6 and distance(stacked[1], alone[2]) < 2e-6


def test_training_on_the_cpu_stacks_images_of_one_size(monkeypatch):
    """Call the ops once for a stack; gradients are those of one image after the other."""
    encoder, sizes = encoder_of(), [(64, 48), (40, 52), (64, 48), (64, 48)]
    images = [pixels_of(*size, seed=seed) for seed, size in enumerate(sizes)]
    windows = torch.tensor([[0.0, 255.0], [255.0, 0.0], [10.0, 200.0], [0.0, 100.0]])
    names, seen = ("stem", "conv_norm_act"), []
    for name in names:
        op = getattr(hia_kernels, name)
        monkeypatch.setattr(hia_kernels, name, lambda x, *args, op=op, n=name: seen.append((n, len(x))) or op(x, *args))

    def gradients(maps):
        seen_now = sorted(set(seen)), len(seen)
        seen.clear()
        return maps, torch.autograd.grad(sum(m.square().mean() for m in maps), list(encoder.parameters())), seen_now

    maps, found, calls = gradients(encoder.forward_many(images, windows))
    assert calls == ([("conv_norm_act", 1), ("conv_norm_act", 3), ("stem", 1), ("stem", 3)], 2 * 53)
    alone, expected, calls = gradients([encoder(*pair) for pair in zip(images, windows, strict=True)])
    assert calls == ([("conv_norm_act", 1), ("stem", 1)], 4 * 53)
    assert all(distance(a, b) < 2e-6 for a, b in zip(maps, alone, strict=True))
    ours, theirs = (torch.cat([grad.flatten() for grad in grads]) for grads in (found, expected))
    assert distance(ours, theirs) < 1e-4
    large = [torch.empty(512, 1024, 1)] * 5
    assert encoder._groups(large, None) == [[0, 1], [2, 3], [4]]
    with torch.no_grad():
        assert encoder._groups(large, None) == [[0], [1], [2], [3], [4]]


def test_a_device_gets_images_of_one_size_together():
    encoder = encoder_of().to("meta")
    images = [torch.empty(*size, device="meta") for size in [(64, 64, 1), (64, 64, 3), (64, 64, 1), (32, 64, 1)]]
    assert encoder._groups(images, None) == [[0, 2], [1], [3]]
    assert encoder._groups([torch.empty(2048, 1024, 1)] * 5, None) == [[0, 1], [2, 3], [4]]
    assert encoder._groups([torch.empty(4096, 4096, 1)] * 2, None) == [[0], [1]]
    live = encoder_of(batch_norm="batch").train().to("meta")
    assert live._groups(images, None) == [[0, 2], [1], [3]]
    assert live._groups([torch.empty(4096, 4096, 1)] * 2, None) == [[0, 1]]  # a limit would change the statistics


def test_synchronised_batch_norm_keeps_its_statistics_too():
    encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder_of()).train()
    assert isinstance(encoder.layer1[0].bn1, nn.SyncBatchNorm) and not encoder.layer1[0].bn1.training
    before = encoder.bn1.running_mean.clone()
    encoder(pixels_of(48, 48), WINDOW).sum().backward()
    assert torch.equal(encoder.bn1.running_mean, before) and encoder.bn1.weight.grad.any()


def live_encoder(**changes):
    """Make an encoder that takes live statistics and leaves the running ones alone, so that every call is the same."""
    encoder = encoder_of(encoder_width=4, batch_norm="batch", **changes).train()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    return encoder


@pytest.mark.parametrize("changes", [{}, {"encoder": "strided"}], ids=["resnet50", "strided"])
def test_folded_weights_do_not_serve_live_statistics(changes, monkeypatch):
    encoder, pixels = live_encoder(**changes), pixels_of(96, 80)
    monkeypatch.setattr("hia.encoder.memory.LARGE_MAP", 0)  # every map would go in strips, each with its own statistics
    with torch.no_grad():
        expected = encoder(pixels, WINDOW)
        encoder.eval().fold_weights()
        running = encoder(pixels, WINDOW)
        encoder.train()
        # the call above moved the version
        encoder._folded = dataclasses.replace(encoder._folded, version=encoder.weight_version())
        assert torch.equal(encoder(pixels, WINDOW), expected) and distance(running, expected) > 0.1
        encoder.eval()
        last = encoder.units()[-1]
        next(norm for _, norm in last.pairs()).train()  # one is enough
        assert not encoder._executor().weights and distance(encoder(pixels, WINDOW), running) > 1e-3


def test_live_statistics_are_of_all_images_of_one_size():
    encoder = live_encoder().double()
    images = [pixels_of(*size, seed=seed) for seed, size in enumerate([(64, 48), (40, 52), (64, 48)])]
    windows = torch.tensor([[0.0, 255.0], [255.0, 0.0], [10.0, 200.0]])
    found = encoder.forward_many(images, windows)
    together = Modules(encoder)(torch.stack(images[::2]), windows[::2])
    alone = Modules(encoder)(images[1], windows[1])
    for out, truth in zip(found, (together[0], alone, together[1]), strict=True):
        assert distance(out, truth) < 1e-12
    assert distance(encoder(images[0], windows[0]), found[0]) > 0.01
    sum(out.sum() for out in found).backward()
    assert encoder.layer4[2].bn3.weight.grad.any()


def test_live_statistics_of_one_feature_are_refused():
    encoder = encoder_of(batch_norm="batch").train()
    small = pixels_of(20, 20)
    with pytest.raises(
        ValueError, match="more than one feature together where .* got one of 20 x 20 pixels, a feature"
    ):
        encoder.forward_many([pixels_of(64, 64), small], torch.tensor([[0.0, 255.0]] * 2))
    encoder.forward_many([small, pixels_of(20, 20, seed=1)], torch.tensor([[0.0, 255.0]] * 2))
    encoder.eval().forward_many([small], torch.tensor([[0.0, 255.0]]))


def test_a_budget_never_splits_a_live_batch():
    encoder, images = live_encoder(), [pixels_of(64, 48, seed=seed) for seed in range(3)]
    windows, one = WINDOW.expand(3, 2), memory.activation_bytes(encoder, 64, 48)
    with torch.no_grad():
        whole = encoder.forward_many(images, windows)
        found = encoder.forward_many(images, windows, 3 * one)
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    message = (
        "^hia: max_activation_bytes must hold all 3 images of 64 x 48 at once where batch-norm takes live statistics, "
        f"{3 * one} bytes, got {3 * one - 1}$"
    )
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        encoder.forward_many(images, windows, 3 * one - 1)


def test_synchronised_batch_norm_with_live_statistics(monkeypatch):
    """Call every norm as the module it is, NCHW, once for a group: ranks with as many groups call as often."""
    images, windows = [pixels_of(64, 48, seed=seed) for seed in range(2)], WINDOW.expand(2, 2)
    encoder = live_encoder()
    expected = encoder.forward_many(images, windows)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    norms = [module for module in converted.modules() if isinstance(module, nn.SyncBatchNorm)]
    seen = []
    for norm in norms:
        norm.register_forward_hook(lambda norm, args, out: seen.append((norm.training, *args[0].shape)))
    found = converted.forward_many(images, windows)
    assert all(distance(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))
    assert len(seen) == len(norms) == 53 and seen[0] == (True, 2, 4, 32, 24)
    sum(out.sum() for out in found).backward()
    assert all(norm.weight.grad is not None for norm in norms)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)  # as in a group: torch wants a GPU there
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
        converted.forward_many(images, windows)
    assert converted.eval()(images[0], WINDOW).shape == (2, 2, converted.channels)


class Modules(nn.Module):
    """Do what eager PyTorch does with the same parameters: convolution, batch-norm and ReLU as modules, NCHW."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels, window):
        encoder, conv = self.encoder, nn.Conv2d.forward
        mean, std = (torch.tensor(value)[:, None, None] for value in (encoder.image_mean, encoder.image_std))
        one, window = pixels.dim() == 3, window.reshape(-1, 2, 1, 1, 1)
        pixels = (pixels[None] if one else pixels).permute(0, 3, 1, 2).float()
        x = (pixels - window[:, 0]) / (window[:, 1] - window[:, 0])
        x = ((x.clamp(0, 1) - mean) / std).to(encoder.conv1.weight.dtype)
        x = F.max_pool2d(F.relu(encoder.bn1(conv(encoder.conv1, x))), 3, 2, 1)
        for block in encoder.units():
            y = F.relu(block.bn1(conv(block.conv1, x)))
            y = F.relu(block.bn2(conv(block.conv2, y)))
            y = block.bn3(conv(block.conv3, y))
            if block.downsample is not None:
                x = block.downsample[1](conv(block.downsample[0], x))
            x = F.relu(y + x)
        x = x.permute(0, 2, 3, 1)
        return x[0] if one else x


def kept_bytes(module, parameters, pixels):
    """Count the bytes of everything autograd keeps but the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(pixels, WINDOW)
    return sum(kept.values()), out


def test_training_keeps_less_than_half_of_what_eager_keeps():
    encoder, pixels = encoder_of(encoder_width=16).train(), pixels_of(224, 224)
    ours, out = kept_bytes(encoder, encoder.parameters(), pixels)
    eager, expected = kept_bytes(Modules(encoder), encoder.parameters(), pixels)
    assert ours <= 0.45 * eager
    grads = [torch.autograd.grad(x.square().mean(), list(encoder.parameters())) for x in (out, expected)]
    ours, eager = (torch.cat([grad.flatten() for grad in x]) for x in grads)
    assert distance(out, expected) < 2e-6 and distance(ours, eager) < 1e-4


def test_real_radiographs(radiographs):
    encoder = encoder_of()
    encoder.fold_weights()
    for path in radiographs:
        image = load_image(path)
        assert min(image.pixels.shape[:2]) > 800
        pixels, window = image.pixels[::7, ::7], torch.tensor(image.window)
        with torch.no_grad():
            out = encoder(pixels, window)
        assert distance(out, reference_of(encoder, pixels, window)) < 2e-6, path.name


@pytest.mark.parametrize("name", ["RG1_J2KI", "RG3_J2KR", "RG3_deflated"])
def test_real_dicom(name, data_dir):
    """Encode 10 and 15 bits, of which bright means dark."""
    pytest.importorskip("pydicom")
    if name != "RG3_deflated":
        pytest.importorskip("openjpeg")
    image = load_image(data_dir / "dicom" / f"{name}.dcm")
    assert image.pixels.dtype == torch.uint16 and int(image.pixels.numpy().astype(np.int64).max()) > 255
    encoder, window = encoder_of(), torch.tensor(image.window)
    pixels = image.pixels[::6, ::6]
    exact = reference_of(encoder, pixels, window)
    encoder.fold_weights()
    with torch.no_grad():
        assert distance(encoder(pixels, window), exact) < 2e-6


def kept_by_dtype(encoder, pixels):
    """Find the largest tensor that autograd keeps of each dtype, in elements, parameters and pixels left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.dtype, []).append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = encoder(pixels, WINDOW)
    assert out.dtype == torch.bfloat16
    return kept


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
@pytest.mark.parametrize("batch_norm", ["running", "batch"])
def test_training_keeps_activations_in_the_compute_dtype(autocast, batch_norm):
    """Allow fp32 to scales, shifts and statistics, a value a channel; cast parameters may be kept, too."""
    encoder = encoder_of(encoder_width=16, batch_norm=batch_norm).train()
    encoder = encoder if autocast else encoder.bfloat16()
    pixels = pixels_of(224, 160)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = kept_by_dtype(encoder, pixels)
    channels = max(norm.num_features for norm in encoder.modules() if isinstance(norm, nn.BatchNorm2d))
    stem = 16 * 56 * 40  # of the largest map that is needed
    assert max(kept[torch.bfloat16]) >= stem
    assert max(kept[torch.float32]) <= channels
    assert not set(kept) - {torch.bfloat16, torch.float32, torch.uint8, torch.int64}


def check_full_size(image, least):
    """Compare every pixel, at a small width, in the reference's fp64."""
    assert min(image.pixels.shape[:2]) >= least
    encoder, window = encoder_of(encoder_width=4), torch.tensor(image.window)
    exact = reference_of(encoder, image.pixels, window)
    with torch.no_grad():
        for run in (encoder, encoder.fold_weights() and encoder):
            assert distance(run(image.pixels, window), exact) < 2e-6


def test_a_real_radiograph_at_full_size(radiographs):
    images = (load_image(path) for path in radiographs)
    image = next(image for image in images if min(image.pixels.shape[:2]) >= 1500)
    assert image.pixels.dtype == torch.uint8
    check_full_size(image, 1500)


def test_a_real_dicom_at_full_size(data_dir):
    pytest.importorskip("pydicom")
    image = load_image(data_dir / "dicom" / "RG3_deflated.dcm")
    bits = int(image.pixels.to(torch.int32).max()).bit_length()
    assert image.pixels.dtype == torch.uint16 and 10 <= bits <= 15
    check_full_size(image, 1500)


BAD = [
    (torch.zeros(64, 64), WINDOW, ValueError, "pixels must have shape"),
    (torch.zeros(64, 64, 2), WINDOW, ValueError, "pixels' channels must be 1 or 3, got 2"),
    (torch.zeros(64, 10, 1), WINDOW, ValueError, "pixels must be at least 11 x 11, the stem's reach, got 64 x 10"),
    (torch.zeros(64, 64, 1).int(), WINDOW, TypeError, "pixels must be uint8 or uint16"),
    (torch.zeros(64, 64, 1), torch.tensor([1.0, 1.0]), ValueError, "window must hold two different finite values"),
    (torch.zeros(64, 64, 1), torch.zeros(3), ValueError, r"window must have shape \[N, 2\]"),
]


@pytest.mark.parametrize("folded", [False, True])
def test_bad_input(folded):
    encoder = encoder_of(encoder_width=4)
    if folded:
        encoder.fold_weights()
    for pixels, window, error, message in BAD:
        with torch.no_grad(), pytest.raises(error, match=f"^hia::stem: {message}"):
            encoder(pixels, window)
    assert encoder.forward_many([], torch.zeros(0, 2)) == []


def test_one_window_an_image():
    encoder, images = encoder_of(encoder_width=4), [pixels_of(64, 64)] * 2
    for windows in (WINDOW.expand(3, 2), WINDOW[None], WINDOW, torch.zeros(2, 3)):
        message = rf"^hia: windows must have shape \[2, 2\], got {re.escape(str(list(windows.shape)))}$"
        with pytest.raises(ValueError, match=message):
            encoder.forward_many(images, windows)
