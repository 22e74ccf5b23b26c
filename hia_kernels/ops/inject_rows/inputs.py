"""Arguments of :func:`hia_kernels.inject_rows` at a shape, and the cost of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...core.costs import INDEX_BYTES, in_mode
from ...core.draw import Draw, Rows, root_scale, row_count

DIFFERENTIABLE = ("hidden", "update", "weight", "bias")
PARAMETERS = ("weight", "bias")


@dataclass(frozen=True)
class Shape:
    """Sizes of a call.

    Attributes:
        tokens: T.
        rows: R, how many rows are drawn, none twice; or the runs that are selected.
        channels: C of the hidden states.
        dim: D of the update.
        bias: whether there is one.
        hidden_dtype: of the hidden states; None takes the others'. Autocast leaves them in fp32.
    """

    tokens: int
    rows: Rows
    channels: int = 48
    dim: int = 32
    bias: bool = True
    hidden_dtype: torch.dtype | None = None


SMALL = Shape(9, 5)  # for a quick check


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, strided: bool = False
) -> dict[str, Any]:
    """Draw hidden [T, C], update [R, D], weight [C, D] and bias [C] of ``dtype`` and row_idx [R] int64, by name.

    Args:
        shape: sizes.
        dtype: of all tensors but the index and, with ``hidden_dtype``, the hidden states.
        device: of all tensors.
        seed: of the random numbers.
        strided: whether hidden and update are views of a wider tensor.
    """
    draw = Draw(dtype, device, seed, strided=strided)
    channels, dim = shape.channels, shape.dim
    return {
        "hidden": draw.data(shape.tokens, channels, dtype=shape.hidden_dtype),
        "update": draw.data(row_count(shape.rows), dim),
        "weight": draw.normal(channels, dim, scale=root_scale(dim)),
        "bias": draw.normal(channels) if shape.bias else None,
        "row_idx": draw.row_idx(shape.rows, shape.tokens, unique=True),
    }


def flops(shape: Shape, mode: str) -> int:
    """Count FLOPs, 2 for each multiply-add of the matrix products; ``mode`` "forward", "backward" or "both"."""
    product = 2 * row_count(shape.rows) * shape.channels * shape.dim
    return in_mode(mode, product, 2 * product)


def moved_bytes(shape: Shape, itemsize: int, mode: str) -> int:
    """Count the fewest bytes moved, at ``itemsize`` an element: inputs read, results and gradients written;
    backward does not read the hidden states, whose gradient is dout."""
    rows = row_count(shape.rows)
    hidden = shape.tokens * shape.channels * (shape.hidden_dtype.itemsize if shape.hidden_dtype else itemsize)
    others = itemsize * (rows * shape.dim + shape.channels * (shape.dim + shape.bias))
    index = INDEX_BYTES * rows
    forward = hidden + others + hidden + index
    backward = others + hidden + hidden + others + index
    return in_mode(mode, forward, backward)
