"""``stem`` on the CPU: strip by strip of rows, or by a few small images at once, so that nothing of full resolution
exists but the pixels.

Normalised pixels are ``x_c = (p - mean_c) / std_c``. With one centre m for all channels that is
``((p - m) + (m - mean_c)) / std_c``: a convolution of ``p - m``, of one channel where the image is grey, and one of
an image of ones, which is a constant except along the border, where the padding counts for zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import devices

STRIP_BYTES = 2 * 2**20  # of a strip's activation: the second core's half of it stays in its L2
ONE = [1, 1]


def unavailable_reasons() -> list[str]:
    """Return why this build of torch can't run it."""
    return [] if torch.backends.mkldnn.is_available() else ["torch was built without oneDNN"]


def unsupported_reasons(
    function: str, weight: Tensor, output_mask: Sequence[bool] | None = None, **rest: Any
) -> list[str]:
    """Return why a call can't be served; the backward alone has an ``output_mask``."""
    found = devices.not_cpu_reasons(weight)
    if weight.dtype == torch.float64:
        found.append("float64 is left to the reference")
    if output_mask is not None and output_mask[0]:
        found.append("the pixels' gradient is left to the reference")
    return found


@dataclass(frozen=True)
class _Folded:
    """The convolution of ``p - centre`` that gives what the norm gives.

    Attributes:
        weight: [OC, CP, K, K], scaled; a grey image's are summed.
        ones: [OC, 1, K, K], the weights of an image of ones.
        bias: [OC], with what the ones add inside the image.
        centre: m.
    """

    weight: Tensor
    ones: Tensor
    bias: Tensor
    centre: float


def fold(weight: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, std: Tensor, channels: int) -> _Folded:
    per_channel = weight.float() * scale[:, None, None, None] / std[:, None, None]  # [OC, 3, K, K]
    centre = mean.mean()
    ones = (per_channel * (centre - mean)[:, None, None]).sum(1, keepdim=True)
    if channels == 1:
        per_channel = per_channel.sum(1, keepdim=True)
    return _Folded(per_channel, ones, shift + ones.sum((1, 2, 3)), float(centre))


class _Strips:
    """Some images' windowed pixels, as many rows at a time as the convolution wants, in one buffer.

    Args:
        pixels: [G, IH, IW, CP].
        window: [G, 2].
        centre: what is taken off the windowed pixel.
        kernel: K.
    """

    def __init__(self, pixels: Tensor, window: Tensor, centre: float, kernel: int):
        self.pixels, self.centre = pixels, centre
        low, high = window.double()[:, :, None, None, None].unbind(1)
        self.low, self.span = low.float(), (high - low).float()  # [G, 1, 1, 1]
        self.kernel, self.pad = kernel, kernel // 2
        self._buffer: Tensor | None = None

    def rows(self, first: int, last: int) -> Tensor:
        """Return what the convolution's rows ``first:last`` read, [G, CP, R, IW + 2 * pad] channels last."""
        images, height, width, channels = self.pixels.shape
        start, stop = 2 * first - self.pad, 2 * (last - 1) - self.pad + self.kernel
        rows = stop - start
        if self._buffer is None or self._buffer.shape[1] < rows:
            self._buffer = torch.zeros(images, rows, width + 2 * self.pad, channels, dtype=torch.float32)
        buffer = self._buffer[:, :rows]
        above, inside = max(0, -start), slice(max(0, start), min(height, stop))
        below = above + inside.stop - inside.start
        buffer[:, :above] = 0
        buffer[:, below:] = 0
        values = buffer[:, above:below, self.pad : self.pad + width]
        values.copy_(self.pixels[:, inside])
        values.sub_(self.low).div_(self.span).clamp_(0, 1).sub_(self.centre)
        return buffer.permute(0, 3, 1, 2)


def half(size: int) -> int:
    return (size - 1) // 2 + 1


def _strip_rows(width: int, channels: int, pool: int) -> int:
    """Return the rows of the result to make at a time; a pooled one takes two of the convolution."""
    return max(1, STRIP_BYTES // ((2 if pool == 3 else 1) * width * channels * 4))


def _groups(images: int, rows: int, step: int) -> list[slice]:
    """Group images that go through at once: several where all their rows fit into a strip."""
    together = max(1, step // rows)
    return [slice(first, min(first + together, images)) for first in range(0, images, together)]


class _Border:
    """The difference between what an image of ones adds along the border and inside.

    Args:
        ones: [OC, 1, K, K].
        size: (IH, IW).
    """

    def __init__(self, ones: Tensor, size: tuple[int, int]):
        kernel = ones.shape[-1]
        self.edge = (kernel // 2 + 1) // 2  # rows, and columns, that reach into the padding
        self.height = half(size[0])
        # an image with the same borders, small where the image isn't
        sides = [side if side < 4 * kernel else 4 * kernel + side % 2 for side in size]
        padding = [kernel // 2] * 2
        image = F.conv2d(ones.new_ones(1, 1, *sides), ones, stride=2, padding=padding)[0].permute(1, 2, 0)
        self.difference = image - ones.sum((1, 2, 3))  # [OH', OW', OC]

    def add_to(self, y: Tensor, first: int) -> None:
        """Change the convolution's rows from ``first`` on, y [G, R, OW, OC], in place."""
        edge, small, rows = self.edge, self.difference.shape[0], y.shape[1]
        top = min(max(edge - first, 0), rows)
        bottom = max(min(self.height - edge - first, rows), top)
        self._add_columns(y[:, top:bottom], self.difference[small // 2])
        for row in (*range(top), *range(bottom, rows)):
            output = first + row
            source = self.difference[output if output < edge else small - (self.height - output)]
            self._add_columns(y[:, row], source)
            y[:, row, edge:-edge] += source[source.shape[0] // 2]

    def _add_columns(self, y: Tensor, source: Tensor) -> None:
        """Add source [OW', OC] to the columns of y [..., OW, OC]."""
        y[..., : self.edge, :] += source[: self.edge]
        y[..., -self.edge :, :] += source[-self.edge :]


def _largest_of_three(y: Tensor, first: int) -> Tensor:
    """Pool ``y[first::2]``, each with its neighbours: a max-pool of 3, stride 2 along the first dim, in place."""
    centres = y[first::2]
    after = y[first + 1 :: 2]
    ahead = centres[: after.shape[0]]
    torch.maximum(ahead, after, out=ahead)
    behind = centres[1 - first :]
    torch.maximum(behind, y[1 - first :: 2][: behind.shape[0]], out=behind)
    return centres


def _convolved(x: Tensor, folded: _Folded, border: _Border, first: int) -> Tensor:
    """Return the norm's result, [G, R, OW, OC], of what the rows from ``first`` on see."""
    y = torch.ops.mkldnn._convolution_pointwise(x, folded.weight, folded.bias, [0, 0], [2, 2], ONE, 1, "none", [], None)
    y = y.permute(0, 2, 3, 1).contiguous()
    border.add_to(y, first)
    return y


def stem_fwd(
    pixels: Tensor,
    window: Tensor,
    mean: Tensor,
    std: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    pool: int,
) -> Tensor:
    """Return [N, PH, PW, OC] of pixels [N, IH, IW, CP]; computed in fp32 whatever the weight's dtype."""
    images, height, width, channels = pixels.shape
    convolved = half(height), half(width)
    pooled = (half(convolved[0]), half(convolved[1])) if pool == 3 else convolved
    out = weight.new_empty(images, *pooled, weight.shape[0])
    folded = fold(weight, scale, shift, mean, std, channels)
    border = _Border(folded.ones, (height, width))
    step = _strip_rows(convolved[1], weight.shape[0], pool)
    for group in _groups(images, pooled[0], step):
        strips = _Strips(pixels[group], window[group], folded.centre, weight.shape[-1])
        for start in range(0, pooled[0], step):
            stop = min(start + step, pooled[0])
            first, last = (max(0, 2 * start - 1), min(convolved[0], 2 * stop)) if pool == 3 else (start, stop)
            y = _convolved(strips.rows(first, last), folded, border, first)
            if pool == 3:  # before the ReLU, which commutes with it
                y = _largest_of_three(y.transpose(0, 1), 2 * start - first)
                y = _largest_of_three(y.transpose(0, 2), 0).permute(1, 2, 0, 3)
            if out.dtype == y.dtype:
                torch.clamp_min(y, 0, out=out[group, start:stop])
            else:
                out[group, start:stop].copy_(y.relu_())
    return out


def stem_bwd(
    dout: Tensor,
    pixels: Tensor,
    window: Tensor,
    mean: Tensor,
    std: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    pool: int,
    output_mask: list[bool],
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of weight, scale, shift.

    Strips are as in the forward, which is computed again unless ``out`` tells where the ReLU passed and no pool hides
    which of its inputs did.

    Each pooled row's windows are whole in its strip, so strips add up. The convolution is linear in its weight, so the
    scale's gradient comes out of the weight's.
    """
    height, width, channels = pixels.shape[1:]
    folded = fold(weight, scale, shift, mean, std, channels)
    known, border = out if pool == 1 else None, _Border(folded.ones, (height, width))
    sums = _TapSums(folded, (height, width))
    # oneDNN's sum costs less a row in longer strips, which fit where no convolution stands beside the gradient
    step = _strip_rows(half(width), weight.shape[0], pool) * (1 if known is None else 2)
    for group in _groups(pixels.shape[0], dout.shape[1], step):
        strips = _Strips(pixels[group], window[group], folded.centre, weight.shape[-1])
        for start in range(0, dout.shape[1], step):
            stop = min(start + step, dout.shape[1])
            # one window more above, which gets no gradient: a pool pads what is above its first row
            first, last = (max(0, 2 * start - 2), min(half(height), 2 * stop)) if pool == 3 else (start, stop)
            x, dz = strips.rows(first, last), dout[group, start:stop].float().contiguous()
            y = _convolved(x, folded, border, first) if known is None else known[group, start:stop]
            if pool == 3:
                dz = _unpool(F.pad(dz, (0, 0, 0, 0, 1, 0)) if start else dz, y)
            else:
                dz = torch.ops.aten.threshold_backward(dz, y.float(), 0)
            sums.add(dz, x, first)

    plain = sums.gradient(mean, std)  # [OC, 3, K, K], of the weight before its scale
    dweight, dscale = plain * scale[:, None, None, None], (plain * weight).sum((1, 2, 3))
    found = dweight.to(weight.dtype), dscale.to(scale.dtype), sums.total.to(shift.dtype)
    wanted = (x if mask else weight.new_empty(0) for x, mask in zip(found, output_mask[1:], strict=True))
    return weight.new_empty(0), *wanted


class _TapSums:
    """The sums over strips, in fp64, of what the outputs' gradients give the taps.

    Args:
        folded: the forward's.
        size: (IH, IW).
    """

    def __init__(self, folded: _Folded, size: tuple[int, int]):
        self.folded, self.size = folded, size
        self.taps = torch.zeros_like(folded.weight, dtype=torch.float64)
        self.ones = torch.zeros_like(folded.ones[:, 0], dtype=torch.float64)  # [OC, K, K], of an image of ones
        self.total = torch.zeros_like(folded.bias, dtype=torch.float64)

    def add(self, dz: Tensor, x: Tensor, first: int) -> None:
        """Add dz [G, R, OW, OC] of the rows from ``first`` on; x [G, CP, R', IW + 2 * pad] is what they saw."""
        self.taps += _tap_gradient(dz, x, self.folded.weight)
        summed = dz.sum(0)  # [R, OW, OC]
        rows = self._inside(first, summed.shape[0], self.size[0]) @ summed.flatten(1)  # [K, OW * OC]
        columns = self._inside(0, summed.shape[1], self.size[1])  # [K, OW]
        self.ones += (columns @ rows.view(-1, *summed.shape[1:])).permute(2, 0, 1)
        self.total += summed.sum((0, 1))

    def _inside(self, first: int, outputs: int, side: int) -> Tensor:
        """Return [K, outputs]: 1 where a tap of an output sees the image, 0 where it sees the padding."""
        kernel = self.ones.shape[-1]
        seen = 2 * torch.arange(first, first + outputs) + torch.arange(kernel)[:, None] - kernel // 2
        return ((seen >= 0) & (seen < side)).float()

    def gradient(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return [OC, 3, K, K] fp64: a grey channel becomes three."""
        shifted = (self.folded.centre - mean)[:, None, None] * self.ones[:, None]
        return (self.taps + shifted) / std[:, None, None]


def _unpool(dr: Tensor, y: Tensor) -> Tensor:
    """Take dr [G, P, PW, OC] back through ReLU and pool, to the first largest of each window of y [G, R, OW, OC]."""
    y = y.permute(0, 3, 1, 2)
    largest, index = torch.ops.aten.max_pool2d_with_indices(y, [3, 3], [2, 2], ONE)
    dr = torch.ops.aten.threshold_backward(dr.permute(0, 3, 1, 2), largest, 0)
    dz = torch.ops.aten.max_pool2d_with_indices_backward(dr, y, [3, 3], [2, 2], ONE, ONE, False, index)
    return dz.permute(0, 2, 3, 1).contiguous()


def _tap_gradient(dz: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    dz, mask = dz.permute(0, 3, 1, 2), [False, True, False]
    return torch.ops.aten.convolution_backward(dz, x, weight, None, [2, 2], [0, 0], ONE, False, [0, 0], 1, mask)[1]
