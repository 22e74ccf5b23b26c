"""PyTorch's matrix products and convolutions without what oneDNN, which computes them on the CPU, does wrong.

*What is not finite, in bf16.* On CPUs with AMX, oneDNN multiplies whole tiles of 32 terms. Where a row ends within one,
it reads on into the next row, or whatever lies behind it, and relies on zeros in the other operand: a NaN or an
infinity there makes the result NaN (uxlfoundation/oneDNN#5717, mended after 3.14 in #5723). Zeros behind the rows mend
it. In other dtypes, on other devices, and where rows are whole tiles, as those of models are, nothing is copied.

*Thin images, in bf16.* On the same CPUs a convolution of more than 1 x 1 with stride 2 is wrong where its result is one
column wide and a dozen rows high (pytorch/pytorch#169688); on others too, the weight's gradient holds what memory held
where the image is one column wide. Zeros up to the third column make the result two columns wide.

*Gradients of a 1 x 1 with stride 2* write past oneDNN's buffers (uxlfoundation/oneDNN#6035); see :func:`_seen`.

*Convolutions in 16 bits without instructions for them* are not oneDNN's, nor are gradients in fp16. PyTorch's own may
round after each of a gradient's nine taps, and are slower than fp32 with a conversion before and after, which is done
here instead (docs/conv_norm_act.md, "CPU").
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 32  # terms of a product, and of a 1 x 1 convolution
ONE_TILE = 16  # rows up to which a product never reads on


@cache
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


@cache
def _has_bf16() -> bool:
    instructions = torch.cpu._is_avx512_bf16_supported() or _has_amx()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and instructions


def multiplies_bf16() -> bool:
    """Tell whether oneDNN is on and multiplies bf16 by instructions of this CPU."""
    return torch.backends.mkldnn.enabled and _has_bf16()


def _is_better_in_fp32(x: Tensor) -> bool:
    """Tell whether a convolution would be PyTorch's own; in fp16 its gradients are, whatever the CPU has."""
    is_pytorchs = x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not multiplies_bf16())
    return is_pytorchs and x.device.type == "cpu"


def _missing(x: Tensor, terms: int, tile: int = TILE) -> int:
    """Return how many terms a sum over ``terms`` needs more to be of whole tiles; 0 where none has to be."""
    if x.dtype != torch.bfloat16 or terms % tile == 0 or x.device.type != "cpu" or not _has_amx():
        return 0
    return -terms % tile


def _before_zeros(x: Tensor, more: int) -> Tensor:
    """Copy x [M, K], with ``more`` zeros behind each row: what is read beyond its end is harmless."""
    return F.pad(x, (0, more))[:, : x.shape[1]]


def whole_tiles(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Make a product read nothing but its operands.

    Args:
        a: [..., M, K].
        b: [..., K, N].

    Returns:
        ``a``, ``b`` with the same product: themselves in most cases, a copy of ``a`` with zeros behind its rows for two
        matrices, [..., M, K'] and [..., K', N] filled up with zeros for batches, which PyTorch makes contiguous.
    """
    more = _missing(a, a.shape[-1])
    if more == 0:
        return a, b
    if a.dim() == 2:
        reads_on = a.shape[0] > ONE_TILE and a.stride(0) != 1  # a transposed one is read by columns
        return (_before_zeros(a, more) if reads_on else a), b
    return (F.pad(a, (0, more)), F.pad(b, (0, 0, 0, more))) if a.shape[-2] > ONE_TILE or b.dim() == 2 else (a, b)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a b``, as ``torch.matmul`` of two tensors of at least two dimensions."""
    return torch.matmul(*whole_tiles(a, b))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x weight^T + bias`` of x [M, K], as ``F.linear``."""
    more = _missing(x, x.shape[1])
    return F.linear(_before_zeros(x, more) if more and x.shape[0] > ONE_TILE else x, weight, bias)


def _seen(x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, int]:
    """Return what a convolution reads of x, and its stride over that.

    A 1 x 1 skips pixels by a slice: in the weight's gradient with a stride of 2, few channels and two threads oneDNN
    writes past its buffers (uxlfoundation/oneDNN#6035).
    """
    return (x[:, ::stride, ::stride], 1) if weight.shape[-1] == 1 else (x, stride)


def missing_columns(x: Tensor, weight: Tensor, stride: int) -> int:
    """Return how many columns of zeros x [N, IH, IW, C] needs, so that a convolution's result has two columns."""
    is_thin = x.shape[2] in (1, 2) and stride == 2 and weight.shape[-1] > 1
    return 3 - x.shape[2] if is_thin and x.dtype == torch.bfloat16 and x.device.type == "cpu" else 0


def _tile(weight: Tensor, channels: int) -> int:
    """Return of what multiple the channels must be; found by trying 1 to 130 of them (tests/ops/test_onednn.py)."""
    if weight.shape[-1] == 1:
        return TILE
    return 16 if 8 < channels < 16 else 2


def convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve with padding ``K // 2``, channels last in and out.

    Args:
        x: [N, IH, IW, C]; any strides, any device.
        weight: [OC, C, K, K].
        stride: in pixels.

    Returns:
        [N, OH, OW, OC], of any strides.
    """
    if _is_better_in_fp32(x):
        return convolution(x.float(), weight.float(), stride).to(x.dtype)
    x, stride = _seen(x, weight, stride)
    more, columns = _missing(x, x.shape[3], _tile(weight, x.shape[3])), missing_columns(x, weight, stride)
    if more or columns:
        x, weight = F.pad(x, (0, more, 0, columns)), F.pad(weight, (0, 0, 0, 0, 0, more))
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, stride=stride, padding=weight.shape[-1] // 2).permute(0, 2, 3, 1)
    return y[:, :, :1] if columns else y


def pytorchs_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: list[int], output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Compute what PyTorch does, in channels last and nothing mended, for dx [N, IH, IW, C] and dweight, any strides.

    What is not in ``output_mask`` is empty. For the other arguments see :func:`convolution_backward`.
    """
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy.permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2),
        weight,
        None,
        [stride, stride],
        padding,
        [1, 1],
        False,
        [0, 0],
        1,
        [*output_mask, False],
    )
    return dx.permute(0, 2, 3, 1) if output_mask[0] else dx, dweight


def convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Compute dx and dweight of :func:`convolution`.

    Args:
        dy: [N, OH, OW, OC].
        x: [N, IH, IW, C].
        weight: [OC, C, K, K].
        stride: in pixels.
        output_mask: which of the two are wanted; the others are None.
    """
    if _is_better_in_fp32(x):
        wide = convolution_backward(dy.float(), x.float(), weight.float(), stride, output_mask)
        dx, dweight = (None if gradient is None else gradient.to(x.dtype) for gradient in wide)
        return dx, dweight
    seen, stride_over_seen = _seen(x, weight, stride)
    (oc, c), (rows, columns) = weight.shape[:2], seen.shape[1:3]
    more_c, more_oc = (_missing(x, channels, _tile(weight, channels)) for channels in (c, oc))
    more_columns = missing_columns(seen, weight, stride_over_seen)
    if more_c or more_oc or more_columns:
        seen = F.pad(seen, (0, more_c, 0, more_columns))
        weight = F.pad(weight, (0, 0, 0, 0, 0, more_c, 0, more_oc))
        dy = F.pad(dy, (0, more_oc, 0, 1 if more_columns else 0))
    padding = [weight.shape[-1] // 2] * 2
    dx_seen, dweight = pytorchs_backward(dy, seen, weight, stride_over_seen, padding, output_mask)
    dx = None
    if output_mask[0]:
        dx = dx_seen[:, :rows, :columns, :c]
        if dx.shape != x.shape:  # zeros where a 1 x 1 skips pixels
            whole = dx.new_zeros(x.shape)
            _seen(whole, weight, stride)[0].copy_(dx)
            dx = whole
        dx = dx.contiguous()
    return dx, dweight[:oc, :c].contiguous() if output_mask[1] else None
