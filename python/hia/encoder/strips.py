"""Encoding an image in strips of rows, for images whose activations would not fit in memory.

Strips go through the whole network one after the other, and every 3 x 3 convolution keeps the rows of its input that
the next strip's first outputs look at. So nothing is computed twice, zeros stand only at the image's own borders, and
the result is that of the whole image (docs/encoder.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hia_kernels.ops.conv_norm_act import packing_unsupported_reasons

from .conv import ConvExecutor

STEM_TEMPORARY = 8 * 2**20  # bytes the stem holds beside its output where it works strip by strip itself
LARGE_MAP = 64 * 2**20  # bytes; the C library asks the system for larger blocks every time
LARGE_STRIP = 16 * 2**20  # bytes of a strip's widest map, about
STEM_HALO = 3  # rows of the stem's output: two see the edge of a cut, with three a cut is never below the stem's reach


Rows = list[Tensor]  # neighbouring rows of one map, [N, R, W, C] each: joining them would copy the map


class Striped(Protocol):
    """Is what strips go through: a stem and units behind it, as :class:`hia.encoder.encoder.Encoder` has them."""

    conv1: Any
    channels: int
    stem_stride: int

    def parameters(self) -> Iterator[nn.Parameter]:
        """List what takes memory, and may want a gradient."""

    def units(self) -> Sequence[Any]:
        """List what follows the stem, in order."""

    def stem(self, pixels: Tensor, window: Tensor, executor: ConvExecutor) -> Tensor:
        """Run the stem: [N, H, W, CP] -> [N, H', W', C]."""

    def takes_live_statistics(self) -> bool:
        """Tell whether any norm takes the statistics of what it is given."""


class _Windows:
    """The input of a 3 x 3 convolution as its rows arrive.

    Args:
        stride: of the convolution.
    """

    def __init__(self, stride: int):
        self.stride = stride
        self.kept: Tensor | None = None

    def push(self, parts: Rows, last: bool) -> Tensor | None:
        """More rows -> what the outputs now complete look at, zeros at the image's borders; None if there are none."""
        above = _zero_row(parts[0]) if self.kept is None else self.kept
        below = [_zero_row(parts[0])] if last else []
        rows = torch.cat([above, *parts, *below], dim=1)
        outputs = max(0, (rows.shape[1] - 3) // self.stride + 1)
        self.kept = rows[:, outputs * self.stride :].clone()
        return rows[:, : (outputs - 1) * self.stride + 3] if outputs else None


def _zero_row(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], 1, *x.shape[2:])


class _Strided:
    """Every row, or every second one, as a 1 x 1 convolution of that stride wants them."""

    def __init__(self, stride: int):
        self.stride, self.skip = stride, 0

    def push(self, parts: Rows) -> Rows:
        """More rows -> those from the first that counts on; the convolution's own stride passes over the others."""
        found = []
        for part in parts:
            if self.skip < part.shape[1]:
                found.append(part[:, self.skip :])
            self.skip = (self.skip - part.shape[1]) % self.stride
        return found


class _Queue:
    """Rows that wait for those they are added to."""

    def __init__(self) -> None:
        self.kept: Rows = []

    def push(self, parts: Rows) -> None:
        """Take more rows; they may be written over once they are popped."""
        self.kept += parts

    def pop(self, rows: int) -> Rows:
        """The first rows, the longest part of them where it lies."""
        if sum(part.shape[1] for part in self.kept) < rows:
            raise RuntimeError("hia: a strip's residual must not be behind its convolutions")
        taken = []
        while rows:
            first = self.kept.pop(0)
            taken.append(first[:, :rows])
            if first.shape[1] > rows:
                self.kept.insert(0, first[:, rows:])
            rows -= taken[-1].shape[1]
        self.kept = [part.clone() for part in self.kept]  # few rows must not hold a strip's memory
        return taken if len(taken) == 1 else [torch.cat(taken[:-1], dim=1), taken[-1]]


class _BottleneckStream:
    """A bottleneck, strip by strip."""

    def __init__(self, block: Any, executor: ConvExecutor):
        self.block, self.executor = block, executor
        self.windows, self.residual = _Windows(block.stride), _Queue()
        self.shortcut = None if block.downsample is None else _Strided(block.stride)

    def push(self, parts: Rows, last: bool) -> Rows:
        """Rows of the input -> those of the output that are complete; ``parts`` may be written over."""
        block, executor = self.block, self.executor
        y = self.windows.push([executor(block.conv1, block.bn1, part) for part in parts], last)
        if self.shortcut is not None:
            conv, norm = block.downsample
            parts = [executor(conv, norm, part, activation="none") for part in self.shortcut.push(parts)]
        self.residual.push(parts)
        if y is None:
            return []
        y = executor(block.conv2, block.bn2, y, pad_rows=False)
        residual = self.residual.pop(y.shape[1])
        shares = y.split([part.shape[1] for part in residual], dim=1)
        return [executor(block.conv3, block.bn3, *pair) for pair in zip(shares, residual, strict=True)]


class _ConvStream:
    """One 3 x 3 convolution with its norm, strip by strip."""

    def __init__(self, unit: Any, executor: ConvExecutor):
        self.unit, self.executor, self.windows = unit, executor, _Windows(unit.stride)

    def push(self, parts: Rows, last: bool) -> Rows:
        """Rows of the input -> those of the output that are complete."""
        seen = self.windows.push(parts, last)
        return [] if seen is None else [self.executor(self.unit.conv, self.unit.norm, seen, pad_rows=False)]


@dataclass(frozen=True)
class _Shape:
    """Of a unit: a bottleneck, or one convolution (``mid`` 0)."""

    channels: int
    mid: int
    out: int
    stride: int
    shortcut: bool

    def halved(self, side: int) -> int:
        return (side - 1) // self.stride + 1

    def whole(self, height: int, width: int) -> int:
        """Elements alive at once when it takes the whole image."""
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
        """Elements alive at once for a strip of so many rows, without what waits between strips."""
        outside = self.halved(rows + 2) * self.halved(width)
        if not self.mid:
            return (2 * rows + 4) * width * self.channels + outside * self.out
        x, first, seen = rows * width * self.channels, rows * width * self.mid, (rows + 4) * width * self.mid
        residual = outside * self.out + (0 if self.shortcut else 2 * width * self.out)
        return x + max(first + seen, residual + seen + outside * self.mid, residual + outside * (self.mid + self.out))

    def waiting(self, width: int) -> int:
        """Elements that wait for the next strip."""
        if not self.mid:
            return 3 * width * self.channels
        return 3 * width * self.mid + 2 * self.halved(width) * self.out


def _shape_of(unit: Any) -> _Shape:
    if not hasattr(unit, "conv3"):
        return _Shape(unit.conv.in_channels, 0, unit.conv.out_channels, unit.stride, False)
    first, last = unit.conv1, unit.conv3
    return _Shape(first.in_channels, first.out_channels, last.out_channels, unit.stride, unit.downsample is not None)


def stem_size(encoder: Striped, height: int, width: int) -> tuple[int, int]:
    """Height and width of the stem's output."""
    for _ in range(encoder.stem_stride // 2):
        height, width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
    return height, width


def _size_behind(units: Sequence[Any], height: int, width: int) -> tuple[int, int]:
    for shape in map(_shape_of, units):
        height, width = shape.halved(height), shape.halved(width)
    return height, width


def activation_bytes(encoder: Striped, height: int, width: int, rows: int | None = None) -> int:
    """How many bytes of activations encoding one image takes at most; its pixels and the parameters not counted.

    Args:
        encoder: of any kind.
        height: of the image, pixels.
        width: of the image, pixels.
        rows: of a strip, in rows of the stem's output; None: the image as a whole.
    """
    weight = encoder.conv1.weight
    size = weight.element_size()
    first = next(conv for unit in encoder.units() for conv, _ in unit.pairs())
    if weight.device.type == "cpu" and (weight.dtype != torch.float32 or packing_unsupported_reasons(first.weight)):
        size *= 4  # plain PyTorch serves it, with temporaries in fp32 or fp64
    height, width = stem_size(encoder, height, width)
    stem_rows = height if rows is None else min(height, rows + 2 * STEM_HALO)
    stem = stem_rows * width * weight.shape[0] * size
    peak = stem + (encoder.stem_stride**2 * stem if weight.dtype == torch.float64 else STEM_TEMPORARY)
    waiting, live = 0, height if rows is None else rows
    for unit in encoder.units():
        shape = _shape_of(unit)
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
    for shape in map(_shape_of, units):
        out, needed = shape.workspace(height, width)
        most = max(most, taken + needed)
        taken = out or taken
        height, width = shape.halved(height), shape.halved(width)
    return images * most


def check_budget(budget: int | None) -> None:
    """Raises ValueError unless ``max_activation_bytes`` is a positive int or None."""
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget <= 0):
        raise ValueError(f"hia: max_activation_bytes must be a positive int or None, got {budget!r}")


def strip_rows(encoder: Striped, height: int, width: int, budget: int) -> int | None:
    """The largest strip within the budget, in rows of the stem's output; None: the whole image fits.

    Raises:
        ValueError: not even the smallest strip does.
    """
    if activation_bytes(encoder, height, width) <= budget:
        return None
    unit = 32 // encoder.stem_stride  # rows of the stem's output behind one row of features
    least = activation_bytes(encoder, height, width, unit)
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
    """How many units to take in strips though memory is no question, and the rows of a strip.

    Those up to the first that halves the map, where maps are largest: asking the system for such a map's memory, and
    for every one anew, costs what the strips' bookkeeping does, and half of the peak is saved. Deeper it costs more.
    """
    height, width = stem_size(encoder, height, width)
    units = encoder.units()
    row = width * _shape_of(units[0]).out * encoder.conv1.weight.element_size()
    if height * row <= LARGE_MAP:
        return 0, 0
    strips = max(1, min(round(height * row / LARGE_STRIP), height // 8))  # of one height: a short one is slow
    return 1 + next(number for number, unit in enumerate(units) if unit.stride == 2), -(-height // strips)


def check_inference(encoder: Striped, pixels: Tensor, height: int, width: int, budget: int) -> None:
    """Raise where strips can't be used: an image has one graph, and live statistics are of the whole of it.

    Raises:
        ValueError: gradients are recorded, or a norm takes live statistics.
    """
    tensors = (pixels, *encoder.parameters())
    reason = None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        reason = "gradients are recorded"
    elif encoder.takes_live_statistics():
        reason = "batch-norm takes live statistics"
    if reason is not None:
        raise ValueError(
            f"hia: max_activation_bytes must hold the whole image where {reason}, "
            f"{activation_bytes(encoder, height, width)} bytes for {height} x {width}, got {budget}"
        )


def _stream(unit: Any, executor: ConvExecutor) -> _BottleneckStream | _ConvStream:
    return _BottleneckStream(unit, executor) if hasattr(unit, "conv3") else _ConvStream(unit, executor)


def encode_strips(
    encoder: Striped,
    pixels: Tensor,
    window: Tensor,
    executor: ConvExecutor,
    rows: int,
    count: int | None = None,
    spare: bool = False,
) -> Tensor:
    """[1, H, W, CP] -> [1, H', W', C], ``rows`` rows of the stem's output at a time.

    Args:
        encoder: without live statistics.
        pixels: of one image.
        window: [1, 2].
        executor: how convolutions are computed.
        rows: of a strip.
        count: units behind the stem to go through; None: all.
        spare: memory is no question: run the stem once, if its result is small beside what follows.
    """
    units, stride = encoder.units()[:count], encoder.stem_stride
    height, width = stem_size(encoder, *pixels.shape[1:3])
    streams = [_stream(unit, executor) for unit in units]
    first = _shape_of(units[0])
    small = 2 * first.channels * first.stride**2 <= first.out  # a call a strip costs more than its memory then
    stem = encoder.stem(pixels, window, executor) if spare and small else None
    out, filled = None, 0
    for start in range(0, height, rows):
        stop, above = min(start + rows, height), max(0, start - STEM_HALO)
        if stem is None:
            cut = pixels[:, above * stride : (stop + STEM_HALO) * stride]
            parts = [encoder.stem(cut, window, executor)[:, start - above : stop - above]]
        else:
            parts = [stem[:, start:stop]]
        for stream in streams:
            if parts:
                parts = stream.push(parts, stop == height)
        for part in parts:
            if out is None:
                out = part.new_empty(1, *_size_behind(units, height, width), part.shape[-1])
            out[:, filled : filled + part.shape[1]] = part
            filled += part.shape[1]
    if out is None or filled != out.shape[1]:
        raise RuntimeError(f"hia: strips must make every row of the features, got {filled}")
    return out
