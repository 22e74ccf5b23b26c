"""The encoder's training step as a PyTorch user would write it: plain modules on stacks of images of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import HiAStep, Outputs


class PlainEncoder:
    """A step's encoder, ResNet-50 or strided, with ``F.conv2d``, batch-norm, ReLU and max-pool in place of our ops.

    Args:
        name: of the provider.
        layout: of the images in memory: ``torch.contiguous_format`` (NCHW) or ``torch.channels_last``.
    """

    ops = ("encode_train_step",)

    def __init__(self, name: str, layout: torch.memory_format) -> None:
        self.name, self._layout = name, layout

    def encode(self, step: HiAStep, images: Sequence[Tensor], windows: Tensor) -> Outputs:
        """Encode: one [H', W', C] per image, from raw pixels."""
        found: dict[int, Tensor] = {}
        for size in dict.fromkeys(image.shape for image in images):
            group = [index for index, image in enumerate(images) if image.shape == size]
            x = self._normalised(step, torch.stack([images[index] for index in group]), windows[group])
            found.update(zip(group, _features(step.adapter.encoder, x).permute(0, 2, 3, 1), strict=True))
        return tuple(found[index] for index in range(len(images)))

    def _normalised(self, step: HiAStep, pixels: Tensor, windows: Tensor) -> Tensor:
        """Normalise [N, H, W, 1] -> [N, 3, H, W], in the weights' dtype."""
        encoder = step.adapter.encoder
        mean, std = (
            torch.tensor(value, device=pixels.device).view(3, 1, 1) for value in (encoder.image_mean, encoder.image_std)
        )
        low, high = windows[:, :, None, None, None].unbind(1)
        x = ((pixels.permute(0, 3, 1, 2).float() - low) / (high - low)).clamp(0, 1)
        return ((x - mean) / std).to(encoder.conv1.weight.dtype).contiguous(memory_format=self._layout)


def _step(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return norm(F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding))


def _features(encoder: Any, x: Tensor) -> Tensor:
    """Encode [N, 3, H, W] -> [N, C, H', W']."""
    x = F.relu(_step(encoder.conv1, encoder.bn1, x))
    if encoder.pool == 3:
        x = F.max_pool2d(x, 3, stride=2, padding=1)
    for unit in encoder.units():
        if not isinstance(unit, nn.Module):  # the strided encoder's: a convolution and its norm
            x = F.relu(_step(unit.conv, unit.norm, x))
            continue
        y = F.relu(_step(unit.conv1, unit.bn1, x))
        y = _step(unit.conv3, unit.bn3, F.relu(_step(unit.conv2, unit.bn2, y)))
        x = F.relu(y + (x if unit.downsample is None else _step(*unit.downsample, x)))
    return x


PLAIN_ENCODERS = (
    PlainEncoder("plain", torch.contiguous_format),
    PlainEncoder("plain_channels_last", torch.channels_last),
)
