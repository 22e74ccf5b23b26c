"""Encoding an image in strips of rows, for images whose activations would not fit in memory.

Strips go through the whole network one after the other, and every 3 x 3 convolution keeps the rows of its input that
the next strip's first outputs look at. So nothing is computed twice, zeros stand only at the image's own borders, and
the result is that of the whole image (docs/encoder.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .executor import ConvExecutor
from .memory import STEM_HALO, Striped, shape_of, size_behind, stem_size

Rows = list[Tensor]  # neighbouring rows of one map, [N, R, W, C] each: joining them would copy the map


class _Windows:
    """The input of a 3 x 3 convolution as its rows arrive.

    Args:
        stride: of the convolution.
    """

    def __init__(self, stride: int):
        self.stride = stride
        self.kept: Tensor | None = None

    def push(self, parts: Rows, last: bool) -> Tensor | None:
        """Take more rows; return what the outputs now complete look at, with zeros at the image's borders."""
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
        """Take more rows; return those from the first that counts on, for a convolution of that stride."""
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
        """Return the first rows, the longest part of them where it lies."""
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
        """Take rows of the input, which may be written over; return those of the output that are complete."""
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
        """Take rows of the input; return those of the output that are complete."""
        seen = self.windows.push(parts, last)
        return [] if seen is None else [self.executor(self.unit.conv, self.unit.norm, seen, pad_rows=False)]


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
    """Encode ``rows`` rows of the stem's output at a time: [1, H, W, CP] -> [1, H', W', C].

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
    first = shape_of(units[0])
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
                out = part.new_empty(1, *size_behind(units, height, width), part.shape[-1])
            out[:, filled : filled + part.shape[1]] = part
            filled += part.shape[1]
    if out is None or filled != out.shape[1]:
        raise RuntimeError(f"hia: strips must make every row of the features, got {filled}")
    return out
