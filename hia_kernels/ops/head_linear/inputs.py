"""Arguments of :func:`hia_kernels.head_linear` at a shape, and the cost of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...core.costs import in_mode
from ...core.draw import Draw, root_scale

DIFFERENTIABLE = ("x", "weight")
PARAMETERS = ("weight",)


@dataclass(frozen=True)
class Shape:
    """Sizes of a call.

    Attributes:
        images: n.
        rows: R of an image.
        heads: H.
        channels: C, in.
        dim: D, out.
        merge_heads: whether the heads' results lie side by side.
    """

    images: int
    rows: int
    heads: int = 3
    channels: int = 48
    dim: int = 32
    merge_heads: bool = False


SMALL = Shape(2, 9)  # for a quick check


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, strided: bool = False
) -> dict[str, Any]:
    """Draw x [n, H, R, C] and weight [H, D, C] of ``dtype``, by name.

    Without ``strided`` as in the layer: queries come row by row with their heads side by side and meet a projection's
    weight transposed; merged are results, which the attention leaves head by head.

    Args:
        shape: sizes.
        dtype: of both tensors.
        device: of both tensors.
        seed: of the random numbers.
        strided: whether x, always laid out as queries, is also a view of a wider tensor.
    """
    draw = Draw(dtype, device, seed, strided=strided)
    heads, channels, dim, scale = shape.heads, shape.channels, shape.dim, root_scale(shape.channels)
    if strided or not shape.merge_heads:
        x = draw.data(shape.images, shape.rows, heads, channels).transpose(1, 2)
    else:
        x = draw.data(shape.images, heads, shape.rows, channels)
    if strided or shape.merge_heads:
        weight = draw.normal(heads, dim, channels, scale=scale)
    else:
        weight = draw.normal(heads, channels, dim, scale=scale).mT
    return {"x": x, "weight": weight, "merge_heads": shape.merge_heads}


def flops(shape: Shape, mode: str) -> int:
    """Count FLOPs, 2 for each multiply-add of the matrix products; ``mode`` "forward", "backward" or "both"."""
    product = 2 * shape.images * shape.heads * shape.rows * shape.channels * shape.dim
    return in_mode(mode, product, 2 * product)


def moved_bytes(shape: Shape, itemsize: int, mode: str) -> int:
    """Count the fewest bytes moved, at ``itemsize`` an element: inputs read, results and gradients written."""
    rows = shape.images * shape.heads * shape.rows
    read = rows * shape.channels + shape.heads * shape.dim * shape.channels
    out = rows * shape.dim
    return itemsize * in_mode(mode, read + out, read + out + read)
