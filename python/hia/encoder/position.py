"""The place of a feature in its image, added to the features: sines and cosines in two dimensions.

Attention over Z has no order: without positions the adapter can learn *whether*, never *where*. As in DETR (Carion et
al., 2020) half of the channels tell the row and half the column, each axis in fractions of the image, so that "upper
left" is one place in every size, aspect ratio and stride. The wavelengths are a geometric series (Vaswani et al., 2017)
from four images, which no two places share, down to a sixteenth of one.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LONGEST, SHORTEST = 4.0, 1 / 16  # wavelengths along an axis, in images


def axis_codes(length: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Compute the codes of one axis: sines in the first half of the channels, cosines in the second.

    Args:
        length: features along the axis.
        channels: of the codes, even.
        device: of the result.
        dtype: of the result; computed in fp32, for fp64 in fp64.

    Returns:
        [length, channels]: sin and cos of 2 pi x / wavelength, x = (i + 1/2) / length.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    count = channels // 2
    exponent = torch.arange(count, device=device, dtype=exact) / max(1, count - 1)
    waves = (LONGEST / SHORTEST) ** exponent / LONGEST  # [count], in periods an image
    place = (torch.arange(length, device=device, dtype=exact) + 0.5) / length
    angle = 2 * torch.pi * place[:, None] * waves
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype)


@lru_cache(maxsize=64)
def _kept_codes(length: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # one that is made there can't take part in training later
        return axis_codes(length, channels, device, dtype)


def add_position(features: Tensor) -> Tensor:
    """Add the codes of rows to the first half of the channels, those of columns to the second.

    Args:
        features: [N, H, W, C], C a multiple of 4; written over where no gradient is recorded.

    Returns:
        [N, H, W, C] in the same dtype.
    """
    _, height, width, channels = features.shape
    tracing = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()  # not the tensors of a trace
    codes = axis_codes if tracing else _kept_codes
    half = channels // 2
    rows = codes(height, half, features.device, features.dtype)[:, None]
    columns = codes(width, half, features.device, features.dtype)
    if torch.is_grad_enabled():
        return torch.cat([features[..., :half] + rows, features[..., half:] + columns], dim=-1)
    features[..., :half] += rows
    features[..., half:] += columns
    return features
