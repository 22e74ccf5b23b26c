"""Arguments of :func:`hia_kernels.conv_norm_act` at a shape, and the cost of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...core.costs import in_mode, statistics_itemsize
from ...core.draw import Draw, root_scale

DIFFERENTIABLE = ("x", "weight", "scale", "shift", "residual")
PARAMETERS = ("weight", "scale", "shift")


@dataclass(frozen=True)
class Shape:
    """Sizes and options of a call.

    Attributes:
        size: IH, IW, in pixels.
        images: N.
        channels: C and OC.
        kernel: K.
        stride: in pixels.
        activation: "none", "relu" or "gelu".
        residual: whether there is one.
        nchw: x is a view of memory that PyTorch calls contiguous.
    """

    size: tuple[int, int]
    images: int = 2
    channels: tuple[int, int] = (16, 24)
    kernel: int = 3
    stride: int = 1
    activation: str = "relu"
    residual: bool = False
    nchw: bool = False

    @property
    def out_size(self) -> tuple[int, int]:
        """Return OH, OW, in pixels."""
        height, width = ((side - 1) // self.stride + 1 for side in self.size)
        return height, width


SMALL = Shape((5, 4), residual=True)  # for a quick check


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, strided: bool = False
) -> dict[str, Any]:
    """Draw x [N, IH, IW, C], weight [OC, C, K, K] and residual [N, OH, OW, OC] of ``dtype``, scale and shift [OC] fp32
    (fp64 with fp64), by name.

    Args:
        shape: sizes and options.
        dtype: of x, weight and residual.
        device: of all tensors.
        seed: of the random numbers.
        strided: whether the residual is a view of a wider tensor.
    """
    draw = Draw(dtype, device, seed, strided=strided)
    (c, oc), kernel, images = shape.channels, shape.kernel, shape.images
    if shape.nchw:
        x = draw.normal(images, c, *shape.size).permute(0, 2, 3, 1)
    else:
        x = draw.normal(images, *shape.size, c)
    return {
        "x": x,
        "weight": draw.normal(oc, c, kernel, kernel, scale=root_scale(c * kernel * kernel)),
        "scale": draw.near_one(oc),
        "shift": draw.normal(oc, scale=0.5, dtype=draw.statistics),
        "residual": draw.data(images, *shape.out_size, oc) if shape.residual else None,
        "stride": shape.stride,
        "activation": shape.activation,
    }


def flops(shape: Shape, mode: str) -> int:
    """Count FLOPs, 2 for each multiply-add of the convolution; ``mode`` "forward", "backward" or "both"."""
    (height, width), (c, oc) = shape.out_size, shape.channels
    product = 2 * shape.images * height * width * oc * c * shape.kernel**2
    recomputed = shape.activation == "gelu"  # its derivative needs what went into it
    return in_mode(mode, product, (2 + recomputed) * product)


def moved_bytes(shape: Shape, itemsize: int, mode: str) -> int:
    """Count the fewest bytes moved, at ``itemsize`` an element: inputs read, results and gradients written."""
    (height, width), (out_height, out_width), (c, oc) = shape.size, shape.out_size, shape.channels
    out = itemsize * shape.images * out_height * out_width * oc
    parameters = itemsize * oc * c * shape.kernel**2 + 2 * oc * statistics_itemsize(itemsize)
    read = itemsize * shape.images * height * width * c + parameters + (out if shape.residual else 0)
    return in_mode(mode, read + out, read + out + read)
