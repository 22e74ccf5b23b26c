"""Arguments of ``row_dot`` at a shape, and what a call costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hia_kernels.core.costs import in_mode
from hia_kernels.core.draw import Draw

DIFFERENTIABLE = ("x", "y")
PARAMETERS = ()


@dataclass(frozen=True)
class Shape:
    """R rows of C channels."""

    rows: int
    channels: int = 48


SMALL = Shape(5, 9)  # what a quick check runs


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, strided: bool = False
) -> dict[str, Any]:
    """Draw x and y [R, C] of ``dtype``; ``strided``: views of something wider."""
    draw = Draw(dtype, device, seed, strided=strided)
    return {name: draw.data(shape.rows, shape.channels) for name in ("x", "y")}


def flops(shape: Shape, mode: str) -> int:
    """Count 2 a multiply-add of the products; the gradients are none."""
    return in_mode(mode, 2 * shape.rows * shape.channels, 0)


def moved_bytes(shape: Shape, itemsize: int, mode: str) -> int:
    """Count inputs read, results and gradients written."""
    read, out = 2 * shape.rows * shape.channels, shape.rows
    return itemsize * in_mode(mode, read + out, read + out + read)
