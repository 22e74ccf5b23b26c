"""Arguments of :func:`hia_kernels.stem` at a shape, and the cost of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...core.costs import in_mode, statistics_itemsize
from ...core.draw import Draw

DIFFERENTIABLE = ("pixels", "weight", "scale", "shift")  # in pixels only where they are floating
PARAMETERS = ("mean", "std", "weight", "scale", "shift")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
TOPS = {torch.uint8: 255.0, torch.uint16: 4095.0}  # the largest pixel; of floating ones 1


@dataclass(frozen=True)
class Shape:
    """Sizes and options of a call.

    Attributes:
        size: IH, IW, in pixels.
        images: N.
        pixel_dtype: of the pixels.
        channels: CP, of a pixel.
        kernel: K.
        out_channels: OC.
        pool: 3 or 1.
    """

    size: tuple[int, int]
    images: int = 2
    pixel_dtype: torch.dtype = torch.uint8
    channels: int = 1
    kernel: int = 7
    out_channels: int = 8
    pool: int = 3


SMALL = Shape((16, 17))  # for a quick check


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, strided: bool = False
) -> dict[str, Any]:
    """Draw pixels [N, IH, IW, CP], window [N, 2], mean and std [3] fp32, weight [OC, 3, K, K] of ``dtype``, scale and
    shift [OC] fp32 (fp64 with fp64), by name.

    Pixels have their dtype's usual range, a little of it outside the windows; every other image is inverted.

    Args:
        shape: sizes and options.
        dtype: of the weight.
        device: of all tensors.
        seed: of the random numbers.
        strided: ignored: pixels are never a slice of a projection.
    """
    draw = Draw(dtype, device, seed)
    top, kernel, out_channels = TOPS.get(shape.pixel_dtype, 1.0), shape.kernel, shape.out_channels
    pixels = draw.uniform(shape.images, *shape.size, shape.channels, top=top, dtype=shape.pixel_dtype)
    low, high = 0.05 * top, 0.95 * top
    windows = [(high, low) if image % 2 else (low, high) for image in range(shape.images)]
    return {
        "pixels": pixels,
        "window": torch.tensor(windows, dtype=torch.float32).reshape(shape.images, 2).to(device),
        "mean": torch.tensor(MEAN, dtype=torch.float32).to(device),
        "std": torch.tensor(STD, dtype=torch.float32).to(device),
        "weight": draw.normal(out_channels, 3, kernel, kernel, scale=(3 * kernel * kernel) ** -0.5),
        "scale": draw.near_one(out_channels),
        "shift": draw.normal(out_channels, scale=0.5, dtype=draw.statistics),
        "pool": shape.pool,
    }


def _halved(shape: Shape) -> tuple[int, int]:
    height, width = ((side + 1) // 2 for side in shape.size)
    return height, width


def flops(shape: Shape, mode: str) -> int:
    """Count FLOPs, 2 for each multiply-add of the convolution; ``mode`` "forward", "backward" or "both"."""
    height, width = _halved(shape)
    product = 2 * shape.images * height * width * shape.out_channels * 3 * shape.kernel**2
    return in_mode(mode, product, (2 + shape.pixel_dtype.is_floating_point) * product)  # forward once more, dweight


def moved_bytes(shape: Shape, itemsize: int, mode: str) -> int:
    """Count the fewest bytes moved, at ``itemsize`` a weight: inputs read, results and gradients written."""
    height, width = _halved(shape)
    if shape.pool == 3:
        height, width = (height + 1) // 2, (width + 1) // 2
    pixels = shape.images * shape.size[0] * shape.size[1] * shape.channels * shape.pixel_dtype.itemsize
    weights = itemsize * shape.out_channels * 3 * shape.kernel**2
    parameters = weights + 2 * shape.out_channels * statistics_itemsize(itemsize)
    read = pixels + 4 * (2 * shape.images + 2 * 3) + parameters  # windows, mean and std in fp32
    out = itemsize * shape.images * height * width * shape.out_channels
    gradients = parameters + (pixels if shape.pixel_dtype.is_floating_point else 0)
    return in_mode(mode, read + out, read + out + gradients)
