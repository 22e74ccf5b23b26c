"""Arguments of :func:`hia_kernels.linear` at a shape, and the cost of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...core.costs import in_mode
from ...core.draw import Draw, root_scale

DIFFERENTIABLE = ("x", "weight", "bias")
PARAMETERS = ("weight", "bias")


@dataclass(frozen=True)
class Shape:
    """Sizes of a call.

    Attributes:
        rows: R.
        channels: C.
        dim: D.
        bias: whether there is one.
    """

    rows: int
    channels: int = 48
    dim: int = 32
    bias: bool = True


SMALL = Shape(9)  # for a quick check


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, strided: bool = False
) -> dict[str, Any]:
    """Draw x [R, C], weight [D, C] and bias [D] of ``dtype``, by name.

    Args:
        shape: sizes.
        dtype: of all tensors.
        device: of all tensors.
        seed: of the random numbers.
        strided: whether x is a view of a wider tensor.
    """
    draw = Draw(dtype, device, seed, strided=strided)
    channels, dim = shape.channels, shape.dim
    return {
        "x": draw.data(shape.rows, channels),
        "weight": draw.normal(dim, channels, scale=root_scale(channels)),
        "bias": draw.normal(dim) if shape.bias else None,
    }


def flops(shape: Shape, mode: str) -> int:
    """Count FLOPs, 2 for each multiply-add of the matrix products; ``mode`` "forward", "backward" or "both"."""
    product = 2 * shape.rows * shape.channels * shape.dim
    return in_mode(mode, product, 2 * product)


def moved_bytes(shape: Shape, itemsize: int, mode: str) -> int:
    """Count the fewest bytes moved, at ``itemsize`` an element: inputs read, results and gradients written."""
    parameters = shape.dim * (shape.channels + shape.bias)
    read, out = shape.rows * shape.channels + parameters, shape.rows * shape.dim
    return itemsize * in_mode(mode, read + out, read + out + read)
