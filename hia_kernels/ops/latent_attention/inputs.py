"""Arguments of :func:`hia_kernels.latent_attention` at a shape, and the cost of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...core.costs import in_mode
from ...core.draw import Draw, root_scale

DIFFERENTIABLE = ("q", "latent")
PARAMETERS = ()


@dataclass(frozen=True)
class Shape:
    """Sizes of a call.

    Attributes:
        rows: G, of each image: its queries times heads.
        width: D of the latent.
        lengths: tokens of each image.
    """

    rows: int
    width: int
    lengths: tuple[int, ...]


SMALL = Shape(6, 16, (5, 4))  # for a quick check


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, strided: bool = False
) -> dict[str, Any]:
    """Draw q [n, G, D] and latent [T, D] of ``dtype``, by name beside the lengths and the scale.

    Scores are of a few units: neither uniform nor one token alone.

    Args:
        shape: sizes.
        dtype: of both tensors.
        device: of both tensors.
        seed: of the random numbers.
        strided: whether both are views of a wider tensor.
    """
    draw = Draw(dtype, device, seed, strided=strided)
    return {
        "q": draw.data(len(shape.lengths), shape.rows, shape.width),
        "latent": draw.data(sum(shape.lengths), shape.width),
        "lengths": list(shape.lengths),
        "softmax_scale": 2 * root_scale(shape.width),
    }


def flops(shape: Shape, mode: str) -> int:
    """Count FLOPs, 2 for each multiply-add of the matrix products; ``mode`` "forward", "backward" or "both"."""
    product = 2 * sum(shape.lengths) * shape.rows * shape.width
    return in_mode(mode, 2 * product, 5 * product)  # backward: scores once more, and a gradient of each operand


def moved_bytes(shape: Shape, itemsize: int, mode: str) -> int:
    """Count the fewest bytes moved, at ``itemsize`` an element: inputs read, results and gradients written;
    backward reads out beside dout."""
    out = len(shape.lengths) * shape.rows * shape.width
    read = out + sum(shape.lengths) * shape.width
    return itemsize * in_mode(mode, read + out, read + 2 * out + read)
