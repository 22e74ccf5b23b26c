"""The encoder on a GPU: its kernels, its gradients, its memory, its graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import hia_kernels
from bench.measure.accuracy import KINK_SLACK
from bench.measure.memory import peak_bytes
from hia.encoder import memory
from hia.encoder.encoder import Encoder
from hia_kernels.testing import GRADIENT_SLACK, UNIT_ROUNDOFF, assert_close, rel_rms
from tests.hia.encoders import encoder_of, pixels_of, sides_of, without_graphs
from tests.ops.conftest import triton_device  # noqa: F401

DEVICE, BACKEND = "cuda", "triton"
EXACT = {torch.float32: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}
each_dtype = pytest.mark.parametrize("dtype", EXACT, ids=str)
each_encoder = pytest.mark.parametrize("changes", [{}, {"encoder": "strided"}], ids=["resnet50", "strided"])
DEEP = torch.tensor([100.0, 4000.0])


@pytest.fixture(autouse=True)
def own_kernels():
    """Force our kernels: only they promise the same bits."""
    with hia_kernels.use_backend(BACKEND):
        yield


def on_device(dtype=torch.float32, **changes) -> Encoder:
    return encoder_of(**changes).to(DEVICE, dtype)


def deep_pixels(height, width, seed=0, device=DEVICE) -> Tensor:
    """Draw uint16 pixels of 12 bits."""
    return (pixels_of(height, width, seed=seed).to(torch.int32) * 16 + seed).to(torch.uint16).to(device)


def eager(encoder, *call):
    with without_graphs(encoder):
        return encoder(*call)


@pytest.mark.gpu
@each_dtype
@torch.no_grad()
def test_a_replay_is_the_eager_encoder_bit_for_bit(dtype):
    encoder, window = on_device(dtype), DEEP.to(DEVICE)
    cache = encoder.fold_weights().graphs
    for seed in range(4):  # four graphs in turn, which share memory
        for size in ((64, 75), (224, 161)):
            deep = deep_pixels(*size, seed)
            for pixels in (deep, deep.to(torch.float32)):
                assert torch.equal(encoder(pixels, window), eager(encoder, pixels, window))
    assert len(cache.keys) == 4 and cache.nbytes > 0
    for side in (96, 97, 98):  # the first ones go
        for seed in range(3):
            pixels = deep_pixels(side, 75, seed)
            assert torch.equal(encoder(pixels, window), eager(encoder, pixels, window))
    assert sides_of(cache) == [224, 96, 97, 98]
    kept = deep_pixels(224, 161, 1).to(torch.float32)
    assert torch.equal(encoder(kept, window), eager(encoder, kept, window))


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_ends_with_its_weights():
    encoder, pixels, window = on_device(), deep_pixels(96, 75), DEEP.to(DEVICE)
    encoder.fold_weights()
    for _ in range(3):
        before = encoder(pixels, window)
    encoder.layer3[0].conv2.weight.mul_(1.5)
    with pytest.warns(UserWarning, match="parameters have changed since fold_weights"):
        after = encoder(pixels, window)
    assert not torch.equal(after, before)
    encoder.fold_weights()
    for _ in range(3):
        out = encoder(pixels, window)
        assert torch.equal(out, eager(encoder, pixels, window))
    assert len(encoder.current().graphs.keys) == 1 and not torch.equal(out, before)


@pytest.mark.gpu
@torch.no_grad()
def test_replays_on_two_streams_take_turns():
    encoder, window = on_device(torch.bfloat16, encoder_width=16), DEEP.to(DEVICE)
    encoder.fold_weights()
    images = [[deep_pixels(side, 512, seed) for seed in range(10)] for side in (512, 480)]
    expected = [[eager(encoder, image, window) for image in row] for row in images]
    for row in images:
        for image in row[:2]:
            encoder(image, window)
    assert len(encoder.current().graphs.keys) == 2
    streams = [torch.cuda.Stream() for _ in images]
    found = [[], []]
    torch.cuda.synchronize()
    for turn in range(10):
        for stream, row, outs in zip(streams, images, found, strict=True):
            with torch.cuda.stream(stream):
                outs.append(encoder(row[turn], window))
    torch.cuda.synchronize()
    for outs, truths in zip(found, expected, strict=True):
        assert all(torch.equal(out, truth) for out, truth in zip(outs, truths, strict=True))


@pytest.mark.gpu
@torch.no_grad()
def test_what_cannot_be_captured_stays_eager_on_its_own_stream(monkeypatch):
    encoder, pixels, window = on_device(), deep_pixels(96, 75), DEEP.to(DEVICE)
    encoder.fold_weights()
    expected, stream, body = eager(encoder, pixels, window), torch.cuda.current_stream(), encoder.body

    def refusing(x, *args):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not while capturing")
        return body(x, *args)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "body", refusing)
        assert torch.equal(encoder(pixels, window), expected)
        with pytest.warns(UserWarning, match="^hia: no CUDA graph of the encoder .*: not while capturing"):
            assert torch.equal(encoder(pixels, window), expected)
        assert torch.equal(encoder(pixels, window), expected) and torch.cuda.current_stream() == stream
    for seed in range(3):  # another size is captured all the same
        other = deep_pixels(64, 75, seed)
        assert torch.equal(encoder(other, window), eager(encoder, other, window))
    assert sides_of(encoder.current().graphs) == [64]


@pytest.mark.gpu
@pytest.mark.parametrize("folded", [False, True])
@torch.no_grad()
def test_the_callers_own_graph_may_hold_the_encoder(folded):
    """Check that nothing waits for the device, and that no graph is made inside another."""
    encoder, static, window = on_device(), deep_pixels(96, 75), DEEP.to(DEVICE)
    if folded:
        encoder.fold_weights()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        encoder(static, window)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = encoder(static, window)
    for seed in (1, 2):
        static.copy_(deep_pixels(96, 75, seed))
        graph.replay()
        assert torch.equal(out, eager(encoder, static, window))


@pytest.mark.gpu
@each_encoder
@each_dtype
@pytest.mark.parametrize("backend", [BACKEND, "auto"])
@torch.no_grad()
def test_folded_is_the_reference(backend, dtype, changes):
    encoder, window = on_device(dtype, **changes), DEEP.to(DEVICE)
    for pixels in (deep_pixels(149, 101), pixels_of(64, 211, 3).to(DEVICE)):
        with hia_kernels.use_backend("reference"):
            encoder.unfold_weights()
            plain = encoder(pixels, window)
            exact = copy.deepcopy(encoder).to(EXACT[dtype])(pixels, window)
        with hia_kernels.use_backend(backend):
            encoder.fold_weights()
            for _ in range(3):  # launch by launch, captured, replayed
                assert_close("features", encoder(pixels, window), exact, plain, dtype=dtype)
        assert len(encoder.current().graphs.keys) == 1
    assert hia_kernels.last_backend("stem") == BACKEND
    assert backend == "auto" or hia_kernels.last_backend("conv_norm_act") == BACKEND


@pytest.mark.gpu
@pytest.mark.parametrize("folded", [False, True])
@each_dtype
@torch.no_grad()
def test_grouped_images_are_each_alone_bit_for_bit(dtype, folded):
    encoder = on_device(dtype)
    sizes = [(96, 75), (64, 211), (96, 75), (33, 40), (96, 75)]
    images = [deep_pixels(*size, seed) for seed, size in enumerate(sizes)]
    windows = torch.tensor([[0.0, 4095.0], [4095.0, 0.0], [10.0, 900.0], [0.0, 100.0], [5.0, 3000.0]]).to(DEVICE)
    assert encoder._groups(images, None) == [[0, 2, 4], [1], [3]]
    if folded:
        encoder.fold_weights()
    alone = [eager(encoder, image, window) for image, window in zip(images, windows, strict=True)]
    for _ in range(3):
        together = encoder.forward_many(images, windows)
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.gpu
@each_encoder
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_device_stays_within_its_budget(dtype, changes):
    encoder, window = on_device(dtype, encoder_width=16, **changes), DEEP.to(DEVICE)
    pixels, unit = deep_pixels(1237, 1101), 32 // encoder.stem_stride
    encoder.fold_weights()
    whole = memory.activation_bytes(encoder, 1237, 1101)
    for budget in (whole, *(memory.activation_bytes(encoder, 1237, 1101, rows) for rows in (unit, 5 * unit))):
        assert (budget < whole) == (memory.strip_rows(encoder, 1237, 1101, budget) is not None)
        encoder(pixels, window, budget)  # kernels are loaded, which isn't an activation
        assert peak_bytes(lambda budget=budget: encoder(pixels, window, budget), DEVICE) <= budget


def gradient_of(encoder, pixels, window) -> Tensor:
    """Return the gradient of all parameters as one vector."""
    out = encoder(pixels, window)
    loss = out.to(torch.promote_types(out.dtype, torch.float32)).square().mean()
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(encoder.parameters()))])


@pytest.mark.gpu
@each_encoder
@each_dtype
def test_gradients_are_the_references(dtype, changes):
    encoder, window = on_device(dtype, **changes).train(), DEEP.to(DEVICE)
    pixels = deep_pixels(96, 75)
    with hia_kernels.use_backend("reference"):
        plain = gradient_of(encoder, pixels, window)
        exact = gradient_of(copy.deepcopy(encoder).to(EXACT[dtype]), pixels, window)
    found = gradient_of(encoder, pixels, window)
    assert exact.isfinite().all() and exact.any()
    if dtype == torch.float32:  # a rounding may put an activation on the other side of a kink
        assert rel_rms(found, exact) <= KINK_SLACK * UNIT_ROUNDOFF[dtype] ** 0.5
    else:
        assert_close("gradient", found, exact, plain, dtype=dtype, slack=GRADIENT_SLACK)


@pytest.mark.interpreter
@pytest.mark.parametrize("folded", [False, True])
@torch.no_grad()
def test_grouped_images_are_each_alone_in_the_interpreter(folded, triton_device):  # noqa: F811
    """Run the same kernels on the smaller network."""
    encoder = encoder_of(encoder="strided", encoder_width=4).to(triton_device)
    windows = torch.tensor([[0.0, 4095.0], [4095.0, 0.0]]).to(triton_device)
    images = [deep_pixels(33, 40, seed, triton_device) for seed in range(2)]
    if folded:
        encoder.fold_weights()
    together = encoder._encode(torch.stack(images), windows, encoder._executor(), None)
    alone = [encoder(image, window) for image, window in zip(images, windows, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True)) and not torch.equal(*alone)
