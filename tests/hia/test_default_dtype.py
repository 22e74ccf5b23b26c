"""The encoder in a process whose default dtype is 16 bits, as a host's loader leaves it: its own bits are the same."""

from __future__ import annotations

import copy

import pytest
import torch

from hia.encoder.calibration import calibrate
from tests.hia.encoders import WINDOW, encoder_of, pixels_of
from tests.ops.harness import default_dtype


def of_encoder(encoder, pixels):
    """Return its result with gradients, its result from folded weights, and what a calibration measures."""
    out = encoder(pixels, WINDOW)
    out.square().sum().backward()
    with torch.no_grad():
        encoder.fold_weights()
        folded = encoder(pixels, WINDOW)
    calibrate(encoder, [lambda: encoder(pixels, WINDOW)])
    return [out.detach(), folded, encoder.conv1.weight.grad, *encoder.buffers()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_bit_of_the_encoder_changes(dtype):
    encoder, pixels = encoder_of(), pixels_of(75, 101, 1)
    expected = of_encoder(copy.deepcopy(encoder), pixels)
    with default_dtype(dtype):
        got = of_encoder(encoder, pixels)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
