"""The memory that encoding takes, and the strips that follow from it: arithmetic alone, nothing is encoded here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hia_kernels.ops.conv_norm_act import packing_unsupported_reasons

from ..free_memory import free_bytes

STEM_TEMPORARY = 8 * 2**20  # bytes the stem holds beside its output where it works strip by strip itself
LARGE_MAP = 64 * 2**20  # bytes; the C library asks the system for larger blocks every time
LARGE_STRIP = 16 * 2**20  # bytes of a strip's widest map, about
AUTO = "auto"
FREE_SHARE = 0.5  # of a GPU's free memory, for one large image: what is freed behind it may lie in pieces
STEM_HALO = 3  # rows of the stem's output: two see the edge of a cut, with three a cut is never below the stem's reach


class Striped(Protocol):
    """A stem and units behind it, which strips go through: :class:`hia.encoder.encoder.Encoder` has them."""

    conv1: Any
    channels: int
    stem_stride: int

    def parameters(self) -> Iterator[nn.Parameter]:
        """List what takes memory, and may want a gradient."""

    def units(self) -> Sequence[Any]:
        """List what follows the stem, in order."""

    def stem(self, pixels: Tensor, window: Tensor, executor: Any) -> Tensor:
        """Run the stem: [N, H, W, CP] -> [N, H', W', C]."""

    def takes_live_statistics(self) -> bool:
        """Tell whether any norm takes the statistics of what it is given."""


@dataclass(frozen=True)
class UnitShape:
    """Sizes of a unit: a bottleneck, or one convolution (``mid`` 0).

    Attributes:
        channels: of its input.
        mid: of its 3 x 3 convolution, in a bottleneck.
        out: of its output.
        stride: of the 3 x 3 convolution.
        shortcut: whether the residual goes through a convolution.
    """

    channels: int
    mid: int
    out: int
    stride: int
    shortcut: bool

    def halved(self, side: int) -> int:
        """Return the side of its output."""
        return (side - 1) // self.stride + 1

    def whole(self, height: int, width: int) -> int:
        """Count the elements alive at once when it takes the whole image."""
        inside, outside = height * width, self.halved(height) * self.halved(width)
        residual = outside * self.out if self.shortcut else 0
        convolved = (inside + outside) * self.mid if self.mid else outside * self.out
        return inside * self.channels + max(convolved, outside * (self.mid + self.out) + residual)

    def workspace(self, height: int, width: int) -> tuple[int, int]:
        """Count its output's elements, none if it is written over the input, and all that it needs of a workspace."""
        inside, outside = height * width, self.halved(height) * self.halved(width)
        out = outside * self.out if self.shortcut or not self.mid else 0
        return out, max(inside * self.mid, out) + outside * self.mid

    def strip(self, rows: int, width: int) -> int:
        """Count the elements alive at once for a strip of so many rows, without what waits between strips."""
        outside = self.halved(rows + 2) * self.halved(width)
        if not self.mid:
            return (2 * rows + 4) * width * self.channels + outside * self.out
        x, first, seen = rows * width * self.channels, rows * width * self.mid, (rows + 4) * width * self.mid
        residual = outside * self.out + (0 if self.shortcut else 2 * width * self.out)
        return x + max(first + seen, residual + seen + outside * self.mid, residual + outside * (self.mid + self.out))

    def waiting(self, width: int) -> int:
        """Count the elements that wait for the next strip."""
        if not self.mid:
            return 3 * width * self.channels
        return 3 * width * self.mid + 2 * self.halved(width) * self.out


def shape_of(unit: Any) -> UnitShape:
    """Read off the sizes of a unit."""
    if not hasattr(unit, "conv3"):
        return UnitShape(unit.conv.in_channels, 0, unit.conv.out_channels, unit.stride, False)
    first, last = unit.conv1, unit.conv3
    return UnitShape(first.in_channels, first.out_channels, last.out_channels, unit.stride, unit.downsample is not None)


def stem_size(encoder: Striped, height: int, width: int) -> tuple[int, int]:
    """Compute height and width of the stem's output."""
    for _ in range(encoder.stem_stride // 2):
        height, width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
    return height, width


def size_behind(units: Sequence[Any], height: int, width: int) -> tuple[int, int]:
    """Compute height and width behind a chain of units."""
    for shape in map(shape_of, units):
        height, width = shape.halved(height), shape.halved(width)
    return height, width


def device_type_of(weight: Tensor) -> str:
    """Name the type of device that weights are on, whose kernels take memory in their own way."""
    return weight.device.type


def activation_bytes(encoder: Striped, height: int, width: int, rows: int | None = None) -> int:
    """Count the bytes of activations that encoding one image takes at most, without its pixels and the parameters.

    Args:
        encoder: of any kind.
        height: of the image, pixels.
        width: of the image, pixels.
        rows: of a strip, in rows of the stem's output; None: the image as a whole.
    """
    weight = encoder.conv1.weight
    size, device_type = weight.element_size(), device_type_of(weight)
    first = next(conv for unit in encoder.units() for conv, _ in unit.pairs())
    if device_type == "cpu" and (weight.dtype != torch.float32 or packing_unsupported_reasons(first.weight)):
        size *= 4  # plain PyTorch serves it, with temporaries in fp32 or fp64
    height, width = stem_size(encoder, height, width)
    stem_rows = height if rows is None else min(height, rows + 2 * STEM_HALO)
    stem = stem_rows * width * weight.shape[0] * size
    temporary = encoder.stem_stride**2 * stem if weight.dtype == torch.float64 else STEM_TEMPORARY
    if device_type == "cuda":  # where kernels write the normalised pixels, of three channels at most
        temporary += 3 * encoder.stem_stride**2 * stem_rows * width * size
    peak = stem + temporary
    waiting, live = 0, height if rows is None else rows
    for unit in encoder.units():
        shape = shape_of(unit)
        needs = shape.whole(height, width) if rows is None else shape.strip(live, width)
        peak = max(peak, needs * size)
        waiting += shape.waiting(width) * size
        height, width, live = shape.halved(height), shape.halved(width), shape.halved(live + 2)
    largest = max(parameter.numel() for parameter in encoder.parameters())
    folded = 2 * largest * size  # a weight with its scale folded in, while its convolution runs
    if rows is None:
        return peak + folded
    return peak + folded + waiting + height * width * encoder.channels * weight.element_size()


def workspace_elements(units: Sequence[Any], size: Sequence[int]) -> int:
    """Count the elements that a chain of units, whose first input lies elsewhere, needs of a workspace.

    Args:
        units: in order.
        size: of the first one's input, [N, H, W, C].
    """
    images, height, width, _ = size
    taken, most = 0, 0
    for shape in map(shape_of, units):
        out, needed = shape.workspace(height, width)
        most = max(most, taken + needed)
        taken = out or taken
        height, width = shape.halved(height), shape.halved(width)
    return images * most


@dataclass(frozen=True)
class AutoBudget:
    """A limit for large images alone, which nothing is refused for: they go through in strips where strips serve.

    Attributes:
        least: bytes that activations may take in any case, since what follows takes as much.
    """

    least: int = 0

    def of(self, encoder: Striped, pixels: Tensor, whole_pixels: int) -> int | None:
        """Return the bytes that activations may take; None for images that go through as a whole.

        Args:
            encoder: of any kind.
            pixels: [N, H, W, CP].
            whole_pixels: pixels that are encoded at once in any case, and what they take is allowed to any image.
        """
        images, height, width, _ = pixels.shape
        if torch.compiler.is_compiling() or images > 1 or height * width <= whole_pixels:
            return None
        if whole_reason(encoder, pixels) is not None:
            return None
        side = math.isqrt(whole_pixels)
        floor = max(activation_bytes(encoder, side, side), least_bytes(encoder, height, width))
        budget, needed = max(self.least, floor), activation_bytes(encoder, height, width)
        if needed > budget:
            budget = max(budget, int(FREE_SHARE * (free_bytes(pixels.device) or 0)))
        return None if needed <= budget else budget


Budget = int | AutoBudget | None


def budget_of(max_activation_bytes: Any, least: int = 0) -> Budget:
    """Check ``max_activation_bytes``; "auto" becomes an :class:`AutoBudget` of ``least`` bytes.

    Raises:
        ValueError: neither "auto" nor a positive int nor None.
    """
    if isinstance(max_activation_bytes, AutoBudget):
        return max_activation_bytes
    if isinstance(max_activation_bytes, str) and max_activation_bytes == AUTO:
        return AutoBudget(least)
    whole = isinstance(max_activation_bytes, int) and not isinstance(max_activation_bytes, bool)
    if max_activation_bytes is not None and not (whole and max_activation_bytes > 0):
        raise ValueError(
            f"hia: max_activation_bytes must be 'auto', a positive int or None, got {max_activation_bytes!r}"
        )
    return max_activation_bytes


def least_bytes(encoder: Striped, height: int, width: int) -> int:
    """Count the bytes that the smallest strip takes: one row of features at a stride of 32."""
    return activation_bytes(encoder, height, width, 32 // encoder.stem_stride)


def strip_rows(encoder: Striped, height: int, width: int, budget: int) -> int | None:
    """Find the largest strip within the budget, in rows of the stem's output; None: the whole image fits.

    Raises:
        ValueError: not even the smallest strip does.
    """
    if activation_bytes(encoder, height, width) <= budget:
        return None
    unit = 32 // encoder.stem_stride  # rows of the stem's output behind one row of features
    least = least_bytes(encoder, height, width)
    if least > budget:
        raise ValueError(
            f"hia: max_activation_bytes must hold one strip of a {height} x {width} image, {least} bytes, got {budget}"
        )
    low, high = 1, -(-height // 32)  # in units; the largest that fits is in [low, high]
    while low < high:
        middle = (low + high + 1) // 2
        if activation_bytes(encoder, height, width, middle * unit) <= budget:
            low = middle
        else:
            high = middle - 1
    return low * unit


def head(encoder: Striped, height: int, width: int) -> tuple[int, int]:
    """Choose how many units to take in strips though memory is no question, and the rows of a strip.

    Those up to the first that halves the map, where maps are largest: asking the system for such a map's memory, and
    for every one anew, costs what the strips' bookkeeping does, and half of the peak is saved. Deeper it costs more.
    """
    height, width = stem_size(encoder, height, width)
    units = encoder.units()
    row = width * shape_of(units[0]).out * encoder.conv1.weight.element_size()
    if height * row <= LARGE_MAP:
        return 0, 0
    strips = max(1, min(round(height * row / LARGE_STRIP), height // 8))  # of one height: a short one is slow
    return 1 + next(number for number, unit in enumerate(units) if unit.stride == 2), -(-height // strips)


def whole_reason(encoder: Striped, pixels: Tensor) -> str | None:
    """Say why an image must be encoded as a whole: it has one graph, and live statistics are of all of it."""
    tensors = (pixels, *encoder.parameters())
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients are recorded"
    return "batch-norm takes live statistics" if encoder.takes_live_statistics() else None


def check_inference(encoder: Striped, pixels: Tensor, height: int, width: int, budget: int) -> None:
    """Raise where strips can't be used.

    Raises:
        ValueError: gradients are recorded, or a norm takes live statistics.
    """
    reason = whole_reason(encoder, pixels)
    if reason is not None:
        raise ValueError(
            f"hia: max_activation_bytes must hold the whole image where {reason}, "
            f"{activation_bytes(encoder, height, width)} bytes for {height} x {width}, got {budget}"
        )
