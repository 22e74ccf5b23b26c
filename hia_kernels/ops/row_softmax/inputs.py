"""Arguments of :func:`hia_kernels.row_softmax` at a shape, and the cost of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...core.costs import in_mode, statistics_itemsize
from ...core.draw import Draw

DIFFERENTIABLE = ("scores",)
PARAMETERS = ()


@dataclass(frozen=True)
class Shape:
    """Sizes and options of a call.

    Attributes:
        rows: R.
        columns: N.
        scale: multiplies the scores.
        spread: deviation of the scores, whose products with ``scale`` the exponential sees.
        out_dtype: of the probabilities; None takes the scores'.
        wide_scores: scores in fp32 (fp64 with fp64), as the product before leaves them, and probabilities in the
            dtype of the call, as the product behind takes them, whatever ``out_dtype`` says.
    """

    rows: int
    columns: int
    scale: float = 0.25
    spread: float = 4.0
    out_dtype: torch.dtype | None = None
    wide_scores: bool = False


SMALL = Shape(5, 9)  # for a quick check


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, strided: bool = False
) -> dict[str, Any]:
    """Draw scores [R, N], by name beside scale and out_dtype.

    Args:
        shape: sizes and options.
        dtype: of the scores; with ``wide_scores`` of the probabilities.
        device: of the scores.
        seed: of the random numbers.
        strided: whether the scores are a view of a wider tensor.
    """
    draw = Draw(dtype, device, seed, strided=strided)
    scores_dtype, out_dtype = (draw.statistics, dtype) if shape.wide_scores else (dtype, shape.out_dtype)
    scores = draw.data(shape.rows, shape.columns, scale=shape.spread, dtype=scores_dtype)
    return {"scores": scores, "scale": shape.scale, "out_dtype": out_dtype}


def flops(shape: Shape, mode: str) -> int:
    """Count none: there is no matrix product; ``mode`` "forward", "backward" or "both"."""
    return in_mode(mode, 0, 0)


def moved_bytes(shape: Shape, itemsize: int, mode: str) -> int:
    """Count the fewest bytes moved, at ``itemsize`` an element of the call's dtype: inputs read, results and gradients
    written; backward reads the probabilities instead of the scores."""
    wide = statistics_itemsize(itemsize)
    elements = shape.rows * shape.columns
    scores = elements * (wide if shape.wide_scores else itemsize)
    own = itemsize if shape.wide_scores or shape.out_dtype is None else shape.out_dtype.itemsize
    out = elements * own + shape.rows * wide  # probabilities and lse
    return in_mode(mode, scores + out, 2 * out + scores)
