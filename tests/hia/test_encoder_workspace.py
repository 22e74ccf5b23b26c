"""The memory that a folded encoder keeps between images, on the CPU with the native kernels."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hia.encoder import memory, workspace
from hia_kernels.ops.conv_norm_act import native
from tests.hia.encoders import WINDOW, distance, encoder_of, pixels_of

REASONS = native.unavailable_reasons()
pytestmark = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))

KINDS = {
    "resnet50": {},
    "released": {"encoder_bias": True},
    "strided": {"encoder": "strided"},
    "strided-16": {"encoder": "strided", "encoder_stride": 16},
}
each_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def folded_encoder(**changes):
    encoder = encoder_of(encoder_width=32, **changes)
    return encoder, encoder.fold_weights()


def encode(encoder, pixels, *budget):
    with torch.no_grad():
        return encoder(pixels, WINDOW, *budget)


@each_kind
def test_same_bits_as_with_fresh_memory(changes, monkeypatch):
    encoder, folded = folded_encoder(**changes)
    sizes = [(75, 101), (160, 64), (33, 47), (127, 131)]

    @settings(max_examples=8, deadline=None)
    @given(size=st.tuples(st.integers(11, 150), st.integers(11, 150)))
    def any_size(size):
        sizes.append(size)

    any_size()
    for size in sizes:
        pixels = pixels_of(*size)
        with monkeypatch.context() as patch:
            patch.setattr(workspace, "LARGEST", 0)
            expected = encode(encoder, pixels)
        if folded.workspace_cache._buffer is not None:
            folded.workspace_cache._buffer.fill_(torch.nan)
        out = encode(encoder, pixels)
        assert torch.equal(out, expected), size
        assert folded.workspace_cache.nbytes > 0


def test_results_are_the_callers():
    encoder, folded = folded_encoder()
    first = encode(encoder, pixels_of(96, 96))
    kept, buffer = first.clone(), folded.workspace_cache._buffer
    encode(encoder, pixels_of(96, 96, seed=1))
    assert torch.equal(first, kept) and folded.workspace_cache._buffer is buffer
    assert folded.nbytes >= folded.workspace_cache.nbytes == buffer.nbytes
    with torch.inference_mode():
        assert torch.equal(encoder(pixels_of(96, 96), WINDOW), first)
    encoder.unfold_weights()
    assert torch.equal(first, kept)


def test_grows_with_the_image_and_no_further(monkeypatch):
    encoder, folded = folded_encoder()
    encode(encoder, pixels_of(64, 64))
    small = folded.workspace_cache.nbytes
    encode(encoder, pixels_of(128, 96))
    large = folded.workspace_cache.nbytes
    encode(encoder, pixels_of(64, 64))
    assert small < large == folded.workspace_cache.nbytes
    assert large <= memory.activation_bytes(encoder, 128, 96)
    monkeypatch.setattr(workspace, "LARGEST", large)
    encode(encoder, pixels_of(160, 160))
    assert folded.workspace_cache.nbytes == large


def test_not_used_within_a_budget_or_while_something_counts():
    from torch.utils.flop_counter import FlopCounterMode

    encoder, folded = folded_encoder()
    pixels = pixels_of(96, 96)
    with FlopCounterMode(display=False):
        out = encode(encoder, pixels)
    assert distance(encode(encoder, pixels, 2**30), out) < 2e-6
    assert folded.workspace_cache.nbytes == 0


def test_second_thread_takes_fresh_memory():
    encoder, folded = folded_encoder()
    pixels = [pixels_of(96, 96, seed=seed) for seed in range(2)]
    expected = [encode(encoder, image) for image in pixels]
    with folded.workspace_cache.lease(1, torch.float32) as place:
        assert place is not None and torch.equal(encode(encoder, pixels[0]), expected[0])
    results = [[], []]

    def work(index):
        for _ in range(10):
            results[index].append(torch.equal(encode(encoder, pixels[index]), expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[True] * 10] * 2


def test_released_after_an_error(monkeypatch):
    encoder, folded = folded_encoder()
    pixels = pixels_of(96, 96)
    expected = encode(encoder, pixels)

    def broken(*_args, **_kwargs):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(type(encoder.units()[3]), "forward", broken)
        with pytest.raises(RuntimeError, match="broken"):
            encode(encoder, pixels)
    with folded.workspace_cache.lease(1, torch.float32) as place:
        assert place is not None
    assert torch.equal(encode(encoder, pixels), expected)


def test_large_image_takes_it_for_one_call(monkeypatch):
    """Expect the same bits behind strips, and nothing kept."""
    encoder, folded = folded_encoder()
    pixels = pixels_of(200, 131)
    whole = encode(encoder, pixels)
    encoder.unfold_weights()
    folded = encoder.fold_weights()
    monkeypatch.setattr(memory, "LARGE_MAP", 2**18)
    monkeypatch.setattr(memory, "LARGE_STRIP", 2**17)
    assert memory.head(encoder, 200, 131)[0] > 0
    assert distance(encode(encoder, pixels), whole) < 2e-6 and folded.workspace_cache.nbytes == 0
