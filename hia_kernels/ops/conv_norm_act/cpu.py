"""``conv_norm_act`` on the CPU: oneDNN's convolution with bias, residual and activation fused behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import devices, onednn
from ...core.fresh import channels_last, reshaped
from ...core.onednn import pytorchs_backward as _backward
from ...core.products import Products, Size
from .layout import PACK, PACKED, Layout

FUSED = {"none": ("none", None), "relu": ("relu", None), "gelu": ("gelu", "none")}  # oneDNN's name and algorithm
# outputs that one call adds up for a weight's gradient; with AVX2 alone 2**13 lost too many digits
LONGEST_SUM = 3 * 2**10
NARROW = 32  # channels: below, MKL's product over all pixels is slow, and loses digits
SHORT_SUM = 2**9  # pixels that one of a batch of narrow products adds up
FEW_CHANNELS = {1: 10, 2: 5}  # by stride: up to here windows are faster than oneDNN in strips
WINDOWS = 2**14  # outputs whose 3 x 3 windows are written side by side at once, 5 MB of them at most
SMALL_OUTPUT = 8  # times an image's pixels go into the channels: from here on 1 x 1 is a product, its result scaled
MIN_CHANNELS_FOR_TAPS = 128  # from here on a tap's product is faster than oneDNN, with stride 1 in a single strip


def unavailable_reasons() -> list[str]:
    """Return why this build of torch can't run it."""
    return [] if torch.backends.mkldnn.is_available() else ["torch was built without oneDNN"]


def unsupported_reasons(function: str, weight: Tensor, x: Tensor | None = None, **rest: Any) -> list[str]:
    """Return why a call of any of the op's functions can't be served, or a weight can't be packed.

    bf16 is for packed weights alone: to round a weight again after scaling it flips more of ReLU's decisions than the
    gradients' bound has room for.
    """
    if function in PACKED and weight.dim() == 3:
        return ["the weight is packed for the native kernels"]
    tensor = weight if x is None else x
    if function != PACK and function not in PACKED:
        return _reasons(tensor, (torch.float32,))
    found = _reasons(tensor, (torch.float32, torch.bfloat16))
    if tensor.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found.append("bfloat16 needs AVX-512 here")
    return found


def _reasons(tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    found = devices.not_cpu_reasons(tensor)
    if tensor.dtype not in dtypes:
        found.append(f"{str(tensor.dtype).removeprefix('torch.')} is left to the reference")
    return found


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight * scale[:, None, None, None]).to(weight.dtype)


def _scales_result(weight: Tensor, pixels: int) -> bool:
    """Tell whether 1 x 1 has so few pixels an image that a copy of the weight, scaled or laid out, costs more."""
    return weight.shape[-1] == 1 and weight.shape[1] >= SMALL_OUTPUT * pixels


def _scaled_near(weight: Tensor, scale: Tensor) -> Tensor:
    """Scale as :func:`_scaled`, channels last: oneDNN takes a large one four times as fast into its own layout."""
    out = torch.empty_like(weight, memory_format=torch.channels_last)
    return torch.mul(weight, scale[:, None, None, None], out=out)


class OneDnnLayout(Layout):
    """The layout of oneDNN for images of a size; for others it is correct too, and slow."""

    name, by_size, writes_out = "oneDNN", True, False

    def __call__(self, weight: Tensor, scale: Tensor, stride: int, size: tuple[int, int], pad_rows: bool) -> Tensor:
        """Return a tensor of oneDNN's own, seen as [OC, C, K, K]."""
        padding, strides, dilation, groups = _geometry(weight, stride, pad_rows)
        return torch.ops.mkldnn._reorder_convolution_weight(
            _scaled(weight, scale).contiguous(), padding, strides, dilation, groups, [1, weight.shape[1], *size]
        )

    def nbytes(self, weight: Tensor, stride: int) -> int:
        """Return those of the weight itself."""
        return weight.nbytes

    def describe(self, packed: Tensor) -> bytes:
        """Return oneDNN's description; empty if this torch can't tell."""
        describe = getattr(torch.ops.mkldnn, "_get_mkldnn_serialized_md", None)
        return b"" if describe is None else bytes(describe(packed).tolist())


LAYOUT = OneDnnLayout()


def _geometry(weight: Tensor, stride: int, pad_rows: bool) -> tuple[list[int], list[int], list[int], int]:
    pad = weight.shape[-1] // 2
    return [pad if pad_rows else 0, pad], [stride, stride], [1, 1], 1


def _is_in_both_layouts(residual: Tensor) -> bool:
    """Tell whether NCHW and channels last are one: torch 2.11 can't describe such an output to oneDNN's sum."""
    _, rows, columns, channels = residual.shape
    return channels == 1 or rows * columns == 1


def conv_norm_act_packed(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: int,
    activation: str,
    pad_rows: bool,
) -> Tensor:
    """Return [N, OH, OW, OC] of x [N, IH, IW, C], the scale folded into ``weight``, which may be packed.

    PyTorch gives oneDNN the bias's address and not its stride.
    """
    columns = onednn.missing_columns(x, weight, stride)
    if columns:
        x, residual = F.pad(x, (0, 0, 0, columns)), None if residual is None else F.pad(residual, (0, 0, 0, 1))
        y = conv_norm_act_packed(x, weight, shift, residual, stride, activation, pad_rows)
        return y[:, :, :1].clone(memory_format=torch.contiguous_format)
    if residual is not None and _is_in_both_layouts(residual):
        out = residual.clone(memory_format=torch.contiguous_format)
        conv_norm_act_packed_inplace(out, x, weight, shift, stride, activation, pad_rows)
        return out
    shift = None if shift is None else shift.contiguous()
    geometry = _geometry(weight, stride, pad_rows)
    x_nchw = x.contiguous().permute(0, 3, 1, 2)
    name, algorithm = FUSED[activation]
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise(x_nchw, weight, shift, *geometry, name, [], algorithm)
        return channels_last(y)
    # oneDNN fuses a sum with relu and with nothing else, and wants the bias in the image's dtype then
    relu = "relu" if activation == "relu" else None
    residual_nchw = residual.contiguous().permute(0, 3, 1, 2)
    bias = None if shift is None else shift.to(x.dtype)
    y = torch.ops.mkldnn._convolution_pointwise.binary(
        x_nchw, residual_nchw, weight, bias, *geometry, "add", 1.0, relu, [], None
    )
    y = channels_last(y)
    return F.gelu(y) if activation == "gelu" else y


def conv_norm_act_packed_inplace(
    residual: Tensor, x: Tensor, weight: Tensor, shift: Tensor | None, stride: int, activation: str, pad_rows: bool
) -> None:
    """Write the result over ``residual``, which is contiguous: a fresh output of this size costs page faults."""
    if residual.numel() == 0:  # PyTorch has no fused sum of bf16 without oneDNN, which takes no empty tensor
        return
    if onednn.missing_columns(x, weight, stride):
        residual.copy_(conv_norm_act_packed(x, weight, shift, residual, stride, activation, pad_rows))
        return
    relu = "relu" if activation == "relu" else None
    torch.ops.mkldnn._convolution_pointwise_.binary(
        residual.permute(0, 3, 1, 2),
        x.contiguous().permute(0, 3, 1, 2),
        weight,
        None if shift is None else shift.to(x.dtype).contiguous(),
        *_geometry(weight, stride, pad_rows),
        "add",
        1.0,
        relu,
        [],
        None,
    )
    if activation == "gelu":
        residual.copy_(F.gelu(residual))


def conv_norm_act_packed_out(
    out: Tensor, x: Tensor, weight: Tensor, shift: Tensor, stride: int, activation: str, pad_rows: bool
) -> None:
    """Copy the result to ``out``: oneDNN, as PyTorch has it, makes its own."""
    out.copy_(conv_norm_act_packed(x, weight, shift, None, stride, activation, pad_rows))


def product_sizes(
    function: str,
    x: Tensor,
    weight: Tensor,
    stride: int,
    activation: str,
    output_mask: Sequence[bool] | None = None,
    **rest: Any,
) -> list[Size]:
    """Return the products that :func:`conv_norm_act_fwd` and :func:`conv_norm_act_bwd` ask their ``products`` for."""
    out_channels, channels, kernel, _ = weight.shape
    if kernel != 1:
        return []
    pixels = ((x.shape[1] - 1) // stride + 1) * ((x.shape[2] - 1) // stride + 1)
    rows, sizes = x.shape[0] * pixels, []
    if _scales_result(weight, pixels) and (output_mask is None or activation == "gelu"):  # which is computed again
        sizes.append((rows, channels, out_channels))
    if output_mask is not None and output_mask[0] and stride == 1 and min(out_channels, channels) >= NARROW:
        sizes.append((rows, out_channels, channels))
    return sizes


def conv_norm_act_fwd(
    products: Products,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: int,
    activation: str,
) -> Tensor:
    """Return [N, OH, OW, OC] of x [N, IH, IW, C]."""
    rows, columns = (x.shape[1] - 1) // stride + 1, (x.shape[2] - 1) // stride + 1
    if x.shape[0] == 0:
        return x.new_empty(0, rows, columns, weight.shape[0])
    if not _scales_result(weight, rows * columns):
        return conv_norm_act_packed(x, _scaled_near(weight, scale), shift, residual, stride, activation, True)
    seen = x[:, ::stride, ::stride].flatten(0, 2)
    y = products.linear(seen, weight.flatten(1), None).mul_(scale).add_(shift)
    y = reshaped(y, x.shape[0], rows, columns, weight.shape[0])
    y = y if residual is None else y.add_(residual)
    if activation == "gelu":
        return torch.ops.aten.gelu_(y)
    return y.relu_() if activation == "relu" else y


def _image_gradient(products: Products, dz: Tensor, x: Tensor, weight: Tensor, scale: Tensor, stride: int) -> Tensor:
    """Return [N, IH, IW, C] of dz [N, OH, OW, OC]."""
    if _scales_result(weight, dz.shape[1] * dz.shape[2]):
        dz = dz * scale
    else:
        weight = _scaled_near(weight, scale)
    pad = weight.shape[-1] // 2
    if pad == 0 and stride == 1:  # a convolution with the weight transposed
        if min(weight.shape[:2]) < NARROW:
            return conv_norm_act_packed(dz, weight.transpose(0, 1).contiguous(), None, None, 1, "none", True)
        return products.product(dz.flatten(0, 2), weight.flatten(1)).view(x.shape)  # faster than oneDNN's backward
    return _backward(dz, x, weight, stride, [pad, pad], [True, False])[0].contiguous()


def _weight_gradient(dz: Tensor, x: Tensor, weight: Tensor, stride: int, exact: bool) -> Tensor:
    """Return [OC, C, K, K], by what is fastest at this shape (docs/conv_norm_act.md).

    Args:
        dz: [N, OH, OW, OC].
        x: [N, IH, IW, C].
        weight: [OC, C, K, K].
        stride: of the convolution.
        exact: whether the scale's gradient comes out of it: oneDNN's sum over a large image is too inexact for that.
    """
    channels, kernel = weight.shape[1:3]
    if kernel == 1:  # oneDNN writes past its buffers with stride 2 and few channels (uxlfoundation/oneDNN#6035)
        seen = x[:, ::stride, ::stride].flatten(0, 2)
        return _summed_products(dz.flatten(0, 2), seen).view(weight.shape)
    if not exact:
        return _backward(dz, x, weight, stride, [1, 1], [False, True])[1].contiguous()
    if channels <= FEW_CHANNELS[stride]:
        return _weight_gradient_by_windows(dz, x, stride)
    if channels >= MIN_CHANNELS_FOR_TAPS and (stride == 2 or dz.shape[:3].numel() <= LONGEST_SUM):
        return _weight_gradient_by_taps(dz, x, stride)
    return _weight_gradient_by_strips(dz, x, weight, stride)


def _summed_products(left: Tensor, right: Tensor) -> Tensor:
    """Compute left^T right, [A, B]; narrow ones as a batch of short sums, which are added in fp64."""
    rows, short = left.shape[0], left.shape[0] // SHORT_SUM * SHORT_SUM
    if min(left.shape[1], right.shape[1]) >= NARROW or rows < 2 * SHORT_SUM:
        return left.mT @ right
    if left.shape[1] > right.shape[1]:  # MKL is faster with the narrower of the two in front
        return _summed_products(right, left).mT.contiguous()
    parts = [x[:short].view(-1, SHORT_SUM, x.shape[1]) for x in (left, right)]
    total = torch.bmm(parts[0].mT, parts[1]).sum(0, dtype=torch.float64)
    if short < rows:
        total += left[short:].mT @ right[short:]
    return total.to(left.dtype)


def _weight_gradient_by_taps(dz: Tensor, x: Tensor, stride: int) -> Tensor:
    """Multiply the gradient of a 3 x 3 with what each of the nine taps saw."""
    rows, columns = (stride * (side - 1) + 1 for side in dz.shape[1:3])
    padded, flat = F.pad(x, (0, 0, 1, 1, 1, 1)), dz.flatten(0, 2).mT  # [OC, N * OH * OW]
    taps = x.new_empty(3, 3, dz.shape[-1], x.shape[-1])
    for ky in range(3):
        for kx in range(3):
            seen = padded[:, ky : ky + rows : stride, kx : kx + columns : stride].flatten(0, 2)
            torch.mm(flat, seen, out=taps[ky, kx])
    return taps.permute(2, 3, 0, 1).contiguous()


def _strips(dz: Tensor, x: Tensor, stride: int, max_outputs: int) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Cut a 3 x 3 convolution into strips of about equal size, of several small images or of a large one's rows.

    Args:
        dz: [N, OH, OW, OC].
        x: [N, IH, IW, C].
        stride: of the convolution.
        max_outputs: of a strip; it has at least a row.

    Yields:
        Some of dz, what of x they saw, and the rows of zeros above and below it.
    """
    images, height, width, _ = dz.shape
    together = -(-images // -(-images // max(1, max_outputs // (height * width))))
    rows = -(-height // -(-height // max(1, max_outputs // width)))
    for image in range(0, images, together):
        for first in range(0, height, rows):
            last, start = min(first + rows, height), stride * first - 1
            stop = stride * (last - 1) + 2
            above, below = max(0, -start), max(0, stop - x.shape[1])
            seen = x[image : image + together, start + above : stop - below]
            yield dz[image : image + together, first:last], seen, above, below


def _weight_gradient_by_strips(dz: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Add up strips' gradients of a 3 x 3: oneDNN's own sum over a large image loses digits."""
    if dz.shape[:3].numel() <= LONGEST_SUM:
        return _backward(dz, x, weight, stride, [1, 1], [False, True])[1].contiguous()
    total = torch.zeros(weight.shape, dtype=torch.float64)
    for gradient, seen, above, below in _strips(dz, x, stride, LONGEST_SUM):
        if above != below:
            seen = F.pad(seen, (0, 0, 0, 0, above, below))
        padding = [above if above == below else 0, 1]
        total += _backward(gradient, seen, weight, stride, padding, [False, True])[1]
    return total.to(weight.dtype)


def _weight_gradient_by_windows(dz: Tensor, x: Tensor, stride: int) -> Tensor:
    """Multiply the gradient of a 3 x 3 of few channels with the windows, written side by side."""
    channels, total = x.shape[-1], torch.zeros(dz.shape[-1], 9 * x.shape[-1], dtype=torch.float64)
    for gradient, seen, above, below in _strips(dz, x, stride, WINDOWS):
        padded = F.pad(seen, (0, 0, 1, 1, above, below))
        by_image, by_row, by_column, _ = padded.stride()
        windows = padded.as_strided(  # [N, OH, OW, 3, 3 * C]: three neighbouring pixels lie side by side
            (*gradient.shape[:3], 3, 3 * channels), (by_image, stride * by_row, stride * by_column, by_row, 1)
        )
        total += _summed_products(gradient.flatten(0, 2), windows.reshape(-1, 9 * channels))
    return total.view(-1, 3, 3, channels).permute(0, 3, 1, 2).to(x.dtype, memory_format=torch.contiguous_format)


class Parts(NamedTuple):
    """The functions that a backward is made of.

    (x, weight, scale, shift, residual, stride, activation) -> out, (dz, x, weight, scale, stride) -> dx, and
    (dz, x, weight, stride, exact) -> the gradient of the weight before its scale.
    """

    forward: Callable[..., Tensor]
    image_gradient: Callable[..., Tensor]
    weight_gradient: Callable[..., Tensor]


def conv_norm_act_bwd(products: Products, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute :func:`backward` with oneDNN's convolutions, MKL's products and those of ``products``."""
    forward, image_gradient = partial(conv_norm_act_fwd, products), partial(_image_gradient, products)
    return backward(Parts(forward, image_gradient, _weight_gradient), *args)


def backward(
    parts: Parts,
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    out: Tensor,
    stride: int,
    activation: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, scale, shift, residual; those not in ``output_mask`` are empty.

    The convolution is linear in its weight, so ``sum(dz * y)`` of a channel is the product of its weight with the
    weight's gradient: the convolution's output is neither kept nor computed again for it.
    """
    like = (x, weight, scale, shift, out)
    if dout.numel() == 0:
        return tuple(t.new_zeros(t.shape) if m else x.new_empty(0) for t, m in zip(like, output_mask, strict=True))
    x = x.contiguous()
    dz = dout.contiguous()
    if activation == "relu":
        dz = torch.ops.aten.threshold_backward(dz, out.contiguous(), 0)
    elif activation == "gelu":
        dz = torch.ops.aten.gelu_backward(dz, parts.forward(x, weight, scale, shift, residual, stride, "none"))

    dx, dweight, dscale, dshift, dresidual = (x.new_empty(0) for _ in range(5))
    if output_mask[0]:
        dx = parts.image_gradient(dz, x, weight, scale, stride)
    if output_mask[1] or output_mask[2]:
        plain = parts.weight_gradient(dz, x, weight, stride, output_mask[2])  # of the weight before its scale
        if output_mask[2]:
            rows = weight.reshape(len(scale), -1, 1)  # a product of each, so that theirs is not written
            dscale = torch.bmm(plain.view(len(scale), 1, -1), rows).view(-1).to(scale.dtype)
        if output_mask[1]:
            dweight = plain.mul_(scale[:, None, None, None])
    if output_mask[3]:
        dshift = dz.sum((0, 1, 2), dtype=shift.dtype)
    if output_mask[4]:
        dresidual = dz.clone() if activation == "none" else dz  # never dout itself
    return dx, dweight, dscale, dshift, dresidual
