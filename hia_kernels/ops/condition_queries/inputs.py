"""Arguments of :func:`hia_kernels.condition_queries` at a shape, and the cost of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...core.costs import INDEX_BYTES, in_mode
from ...core.draw import Draw, Rows, root_scale, row_count

DIFFERENTIABLE = ("hidden", "weight", "bias", "queries")
PARAMETERS = ("weight", "bias", "queries")


@dataclass(frozen=True)
class Shape:
    """Sizes of a call.

    Attributes:
        tokens: T.
        samples: B, how many rows are drawn, with repetition; or the runs that are selected.
        channels: C of the hidden states.
        queries: M.
        dim: D.
        bias: whether there is one.
    """

    tokens: int
    samples: Rows
    channels: int = 48
    queries: int = 5
    dim: int = 32
    bias: bool = True


SMALL = Shape(9, 3)  # for a quick check


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, strided: bool = False
) -> dict[str, Any]:
    """Draw hidden [T, C], weight [D, C], bias [D] and queries [M, D] of ``dtype`` and row_idx [B] int64, by name.

    Args:
        shape: sizes.
        dtype: of all tensors but the index.
        device: of all tensors.
        seed: of the random numbers.
        strided: whether hidden is a view of a wider tensor.
    """
    draw = Draw(dtype, device, seed, strided=strided)
    channels, dim = shape.channels, shape.dim
    return {
        "hidden": draw.data(shape.tokens, channels),
        "row_idx": draw.row_idx(shape.samples, shape.tokens, unique=False),
        "weight": draw.normal(dim, channels, scale=root_scale(channels)),
        "bias": draw.normal(dim) if shape.bias else None,
        "queries": draw.normal(shape.queries, dim),
    }


def flops(shape: Shape, mode: str) -> int:
    """Count FLOPs, 2 for each multiply-add of the matrix products; ``mode`` "forward", "backward" or "both"."""
    product = 2 * row_count(shape.samples) * shape.channels * shape.dim
    return in_mode(mode, product, 2 * product)


def moved_bytes(shape: Shape, itemsize: int, mode: str) -> int:
    """Count the fewest bytes moved, at ``itemsize`` an element: inputs read, of hidden the selected rows,
    results and gradients written, hidden's whole."""
    samples, channels, dim = row_count(shape.samples), shape.channels, shape.dim
    parameters = dim * (channels + shape.bias + shape.queries)
    read = itemsize * (samples * channels + parameters) + INDEX_BYTES * samples
    out = itemsize * samples * shape.queries * dim
    gradients = itemsize * (shape.tokens * channels + parameters)
    return in_mode(mode, read + out, read + out + gradients)
