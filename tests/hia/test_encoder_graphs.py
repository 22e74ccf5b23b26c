"""CUDA graphs of the encoder, on the CPU with a capture that records: what they are kept for."""

from __future__ import annotations

import copy
import dataclasses
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import hia_kernels
from hia import cuda_graphs
from hia.encoder import cuda_graphs as encoder_graphs
from hia.encoder import encoder as encoder_module
from hia.encoder import memory
from hia.encoder.cuda_graphs import EncoderGraphs
from hia.encoder.encoder import Encoder
from tests.hia.captures import Recorder
from tests.hia.encoders import WINDOW, encoder_of, pixels_of, sides_of, without_graphs


def recorded(recorder: Recorder | None = None, kept: int = 4, **changes) -> tuple[Encoder, Recorder]:
    """Make a folded encoder that uses its graphs on the CPU."""
    encoder, recorder = encoder_of(encoder_width=4, **changes), recorder or Recorder()
    encoder._folded = dataclasses.replace(encoder.fold_weights(), graphs=EncoderGraphs(recorder, "cpu", kept))
    return encoder, recorder


@torch.no_grad()
def test_the_second_call_of_a_size_is_captured():
    encoder, recorder = recorded()
    for call, captures, replays in ((1, 0, 0), (2, 1, 1), (3, 1, 2), (4, 1, 3)):
        pixels = pixels_of(40, 52, seed=call)
        with without_graphs(encoder):
            expected = encoder(pixels, WINDOW)
        assert torch.equal(encoder(pixels, WINDOW), expected)
        assert (len(recorder.captured), recorder.replays) == (captures, replays)


KINDS_OF_CALL = {
    "height": lambda: (pixels_of(41, 52)[None], "auto"),
    "width": lambda: (pixels_of(40, 53)[None], "auto"),
    "transposed": lambda: (pixels_of(52, 40)[None], "auto"),
    "number": lambda: (torch.stack([pixels_of(40, 52)] * 2), "auto"),
    "channels": lambda: (pixels_of(40, 52, 3)[None], "auto"),
    "pixels": lambda: (pixels_of(40, 52)[None].to(torch.uint16), "auto"),
    "backend": lambda: (pixels_of(40, 52)[None], "reference"),
}


@torch.no_grad()
def test_every_kind_of_call_has_a_graph_of_its_own():
    encoder, recorder = recorded(kept=20)
    first = pixels_of(40, 52)[None]
    calls = [(first, "auto")] + [make() for make in KINDS_OF_CALL.values()]
    for number, (pixels, backend) in enumerate(calls, start=1):
        windows = WINDOW.expand(pixels.shape[0], 2)
        with hia_kernels.use_backend(backend):
            for _ in range(3):
                out = encoder._encode(pixels, windows, encoder._executor(), None)
            with without_graphs(encoder):
                assert torch.equal(out, encoder._encode(pixels, windows, encoder._executor(), None))
        assert len(recorder.captured) == len(encoder._folded.graphs.keys) == number
    bf16, fp32 = (encoder_graphs.key_of(first, WINDOW[None], dtype) for dtype in (torch.bfloat16, torch.float32))
    assert bf16 != fp32 == encoder._folded.graphs.keys[0]
    on_meta = encoder_graphs.key_of(first.to("meta"), WINDOW[None].to("meta"), torch.float32)
    assert on_meta != fp32


def twice(encoder: Encoder, *sides: int) -> None:
    for side in sides:
        for _ in range(2):
            encoder(pixels_of(side, 40), WINDOW)


@torch.no_grad()
def test_the_size_unused_for_longest_goes():
    encoder, recorder = recorded()
    cache = encoder._folded.graphs
    twice(encoder, 32, 33, 34, 35)
    encoder(pixels_of(32, 40), WINDOW)
    assert sides_of(cache) == [33, 34, 35, 32]
    twice(encoder, 36)
    assert sides_of(cache) == [34, 35, 32, 36] and len(recorder.captured) == 5


@torch.no_grad()
def test_more_sizes_than_graphs_are_not_captured_over_and_over():
    encoder, recorder = recorded()
    twice(encoder, 32, 33, 34, 35, 36)
    for _ in range(cuda_graphs.RETURNS):
        encoder(pixels_of(32, 40), WINDOW)
    assert len(recorder.captured) == 5
    encoder(pixels_of(32, 40), WINDOW)
    assert len(recorder.captured) == 6 and sides_of(encoder._folded.graphs) == [34, 35, 36, 32]


@torch.no_grad()
def test_sizes_seen_once_are_forgotten(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "REMEMBERED_SIZES", 2)
    encoder, recorder = recorded()
    for side in (32, 33, 34, 32):  # the first is as new again
        encoder(pixels_of(side, 40), WINDOW)
    assert recorder.captured == []
    encoder(pixels_of(34, 40), WINDOW)
    assert recorder.captured == [(1, 34, 40, 1)]


@torch.no_grad()
def test_a_changed_parameter_ends_the_graphs():
    encoder, recorder = recorded()
    pixels = pixels_of(40, 52)
    for _ in range(3):
        before = encoder(pixels, WINDOW)
    cache = encoder._folded.graphs
    encoder.layer2[0].bn2.running_var.mul_(2)
    with pytest.warns(UserWarning, match="parameters have changed since fold_weights"):
        after = encoder(pixels, WINDOW)
    assert cache.keys == [] and recorder.replays == 2 and not torch.equal(after, before)
    assert encoder.fold_weights().graphs is not cache
    with without_graphs(encoder):
        expected = encoder(pixels, WINDOW)
    assert torch.equal(encoder(pixels, WINDOW), expected)


@torch.no_grad()
def test_folding_and_unfolding_end_the_graphs_and_copies_have_none():
    encoder, _ = recorded()
    for change in (encoder.unfold_weights, encoder.fold_weights):
        encoder._folded = dataclasses.replace(encoder.fold_weights(), graphs=EncoderGraphs(Recorder(), "cpu"))
        twice(encoder, 32)
        cache = encoder._folded.graphs
        assert sides_of(cache) == [32] and copy.deepcopy(encoder)._folded is None
        change()
        assert cache.keys == []


@torch.no_grad()
def test_outputs_are_the_callers():
    encoder, recorder = recorded()
    outs = [encoder(pixels_of(40, 52, seed=seed), WINDOW) for seed in range(4)]
    assert recorder.replays == 3 and len({out.untyped_storage().data_ptr() for out in outs}) == 4
    kept = outs[1].clone()
    outs[2].zero_()
    encoder(pixels_of(40, 52, seed=9), WINDOW)
    assert torch.equal(outs[1], kept) and not outs[2].any()


@torch.no_grad()
def test_pixels_may_lie_anywhere_and_change_afterwards():
    encoder, recorder = recorded()
    wide = pixels_of(40, 104)
    twice(encoder, 40)
    for pixels in (wide[:, ::2], pixels_of(52, 40).transpose(0, 1), pixels_of(40, 52)):
        out = encoder(pixels, WINDOW)
        with without_graphs(encoder):
            expected = encoder(pixels, WINDOW)
        pixels.zero_()
        assert torch.equal(out, expected)
    assert recorder.replays == 3  # one of the first size, two of the second


@contextmanager
def patched(name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, value)
        yield


@contextmanager
def debugging(encoder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIA_DEBUG", "1")
        yield


@contextmanager
def for_cuda(encoder):
    encoder._folded.graphs.device_type = "cuda"
    yield
    encoder._folded.graphs.device_type = "cpu"


EAGER = {  # context, and the reason given there
    "gradients": (lambda encoder: torch.enable_grad(), "gradients are recorded"),
    "autocast": (lambda encoder: torch.autocast("cpu", torch.bfloat16), "autocast is on"),
    "compiler": (lambda _: patched("torch.compiler.is_compiling", lambda: True), "torch.compile is tracing"),
    "dispatch-mode": (lambda encoder: FlopCounterMode(display=False), "a dispatch mode is active"),
    "size": (lambda _: patched("hia.encoder.encoder.GROUP_PIXELS", 2079), "there are more than 2079 pixels"),
    "debugging": (debugging, "HIA_DEBUG=1 reads values"),
    "capturing": (
        lambda encoder: patched("hia.cuda_graphs.capturing", lambda _: True),
        "a graph is being captured",
    ),
    "another-device": (for_cuda, "pixels are a Tensor on cpu"),
    "switched-off": (without_graphs, None),
}


@pytest.mark.parametrize(("context", "reason"), EAGER.values(), ids=EAGER)
@torch.no_grad()
def test_where_a_graph_cannot_serve_the_call_is_eager(context, reason):
    encoder, recorder = recorded()
    pixels, cache = pixels_of(40, 52), encoder._folded.graphs
    with context(encoder):
        for _ in range(3):
            out = encoder(pixels, WINDOW)
        assert recorder.captured == [] and out.shape == (2, 2, encoder.channels)
        reasons = cache.eager_reasons(pixels[None], encoder_module.GROUP_PIXELS)
        assert reasons == ([] if reason is None else [reason])
    assert cache.eager_reasons(pixels[None], encoder_module.GROUP_PIXELS) == []
    twice(encoder, 40)
    assert len(recorder.captured) == 1


@torch.no_grad()
def test_without_folding_with_a_budget_and_with_live_statistics_it_is_eager():
    encoder, recorder = recorded()
    for budget in (memory.activation_bytes(encoder, 300, 52), memory.activation_bytes(encoder, 300, 52, 8)):
        for _ in range(3):
            encoder(pixels_of(300, 52), WINDOW, budget)
    encoder.layer3[1].bn2.train()
    for _ in range(3):
        encoder(pixels_of(40, 52), WINDOW)
    encoder.eval().unfold_weights()
    for _ in range(3):
        encoder(pixels_of(40, 52), WINDOW)
    assert recorder.captured == [] and recorder.replays == 0


@torch.no_grad()
def test_a_failed_capture_warns_once_and_stays_eager():
    encoder, recorder = recorded(Recorder(fails=lambda inputs: inputs[0].shape[1] == 40))
    pixels = pixels_of(40, 52)
    with without_graphs(encoder):
        expected = encoder(pixels, WINDOW)
    assert torch.equal(encoder(pixels, WINDOW), expected)
    message = "^hia: no CUDA graph of the encoder for 1 x 40 x 52 x 1 pixels, .*: operation not permitted when stream"
    with pytest.warns(UserWarning, match=message):
        assert torch.equal(encoder(pixels, WINDOW), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert torch.equal(encoder(pixels, WINDOW), expected)
        twice(encoder, 41)  # of other sizes nothing is known
    assert sides_of(encoder._folded.graphs) == [41] and recorder.replays == 1


@torch.no_grad()
def test_a_wrong_call_is_refused_though_there_is_a_graph():
    encoder, _ = recorded()
    twice(encoder, 40)
    with pytest.raises(TypeError, match="^hia::stem: window must be float32"):
        encoder(pixels_of(40, 40), WINDOW.double())
    for _ in range(3):
        with pytest.raises(ValueError, match="^hia::stem: pixels must be at least 11 x 11"):
            encoder(pixels_of(10, 40), WINDOW)
    assert sides_of(encoder._folded.graphs) == [40]


def test_inference_mode_leaves_nothing_of_its_own_behind():
    encoder, recorder = recorded()
    for context in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with context():
            for seed in (1, 2):
                pixels = pixels_of(40, 52, seed=seed)
                out = encoder(pixels, WINDOW)
                with without_graphs(encoder):
                    assert torch.equal(out, encoder(pixels, WINDOW))
                assert out.is_inference() == torch.is_inference_mode_enabled()
    assert len(recorder.captured) == 1 and recorder.replays == 5
    encoder(pixels_of(40, 52), WINDOW).sum().backward()
    fresh = encoder_of(encoder_width=4)
    with torch.inference_mode():
        fresh(pixels_of(40, 52), WINDOW)
    fresh(pixels_of(40, 52), WINDOW).sum().backward()  # mean and std were made inside, and are saved here


def test_threads_take_turns():
    encoder, recorder = recorded()
    images = [pixels_of(side, 40, seed=seed) for seed, side in enumerate([32, 33] * 4)]
    with torch.no_grad(), without_graphs(encoder):
        expected = [encoder(image, WINDOW) for image in images]
    failures = []

    def work(image, truth):
        with torch.no_grad():  # a thread has its own
            failures.extend(not torch.equal(encoder(image, WINDOW), truth) for _ in range(5))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(images, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 40 and not any(failures)
    assert len(recorder.captured) == 2 and recorder.replays >= 36


@torch.no_grad()
def test_what_graphs_hold_is_counted():
    encoder, recorder = recorded()
    cache = encoder._folded.graphs
    assert cache.nbytes == recorder.nbytes
    twice(encoder, 32)
    recorder.nbytes += 1000
    assert cache.nbytes == recorder.nbytes + 32 * 40 + WINDOW.nbytes
    before = encoder._folded.nbytes
    recorder.nbytes += 1000
    assert encoder._folded.nbytes == before + 1000
