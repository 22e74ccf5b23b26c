"""Arguments of :func:`hia_kernels.norm_linear` at a shape, and the cost of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...core.costs import INDEX_BYTES, in_mode
from ...core.draw import Draw, Rows, root_scale, row_count

DIFFERENTIABLE = ("x", "norm_weight", "norm_bias", "weight", "bias")
PARAMETERS = ("norm_weight", "norm_bias", "weight", "bias")


@dataclass(frozen=True)
class Shape:
    """Sizes and options of a call.

    Attributes:
        tokens: T.
        rows: R, how many rows are drawn, with repetition; or the runs that are selected; None takes all.
        channels: C.
        dim: D.
        bias: whether there is one.
        norm_dtype: of the norm's weight and bias; None takes that of x.
        offset: mean of x, in its deviations.
    """

    tokens: int
    rows: Rows | None = None
    channels: int = 48
    dim: int = 32
    bias: bool = True
    norm_dtype: torch.dtype | None = None
    offset: float = 0.5


SMALL = Shape(9, 5)  # for a quick check


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, strided: bool = False
) -> dict[str, Any]:
    """Draw x [T, C], norm_weight and norm_bias [C], weight [D, C] and bias [D] of ``dtype`` and row_idx [R] int64, by
    name.

    Args:
        shape: sizes and options.
        dtype: of all tensors but the index and, with ``norm_dtype``, the norm's.
        device: of all tensors.
        seed: of the random numbers.
        strided: whether x is a view of a wider tensor.
    """
    draw = Draw(dtype, device, seed, strided=strided)
    channels, dim, norm_dtype = shape.channels, shape.dim, shape.norm_dtype or dtype
    return {
        "x": draw.data(shape.tokens, channels, mean=shape.offset),
        "norm_weight": draw.near_one(channels).to(norm_dtype),
        "norm_bias": draw.normal(channels, scale=0.25, dtype=norm_dtype),
        "weight": draw.normal(dim, channels, scale=root_scale(channels)),
        "bias": draw.normal(dim) if shape.bias else None,
        "row_idx": None if shape.rows is None else draw.row_idx(shape.rows, shape.tokens, unique=False),
        "eps": 1e-5,
    }


def _rows(shape: Shape) -> int:
    return shape.tokens if shape.rows is None else row_count(shape.rows)


def flops(shape: Shape, mode: str) -> int:
    """Count FLOPs, 2 for each multiply-add of the matrix products; ``mode`` "forward", "backward" or "both"."""
    product = 2 * _rows(shape) * shape.channels * shape.dim
    return in_mode(mode, product, 2 * product)


def moved_bytes(shape: Shape, itemsize: int, mode: str) -> int:
    """Count the fewest bytes moved, at ``itemsize`` an element: inputs read, of x the selected rows, results
    and gradients written, x's whole."""
    rows, channels, dim = _rows(shape), shape.channels, shape.dim
    norm = 2 * channels * (itemsize if shape.norm_dtype is None else shape.norm_dtype.itemsize)
    parameters = norm + itemsize * dim * (channels + shape.bias)
    index = 0 if shape.rows is None else INDEX_BYTES * rows
    read, out = itemsize * rows * channels + parameters + index, itemsize * rows * dim
    gradients = itemsize * shape.tokens * channels + parameters
    return in_mode(mode, read + out, read + out + gradients)
