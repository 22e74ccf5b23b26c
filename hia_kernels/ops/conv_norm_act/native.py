"""``conv_norm_act`` by csrc/cpu/conv_norm_act.cpp, fp32: direct, and for 3 x 3 with stride 1 by Winograd's
F(2 x 2, 3 x 3), where 16 multiplications make four outputs instead of 36, forward and in both gradients
(docs/conv_norm_act.md). What is a large product in :mod:`.cpu` is csrc/cpu/linear.cpp's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import devices, native
from ...core.products import LARGE, is_large
from . import cpu
from .layout import PACK, PACKED, Layout

CHANNELS = 32  # both channel counts are multiples of it: the kernels' panels
POINTS = 16  # of a weight that the Winograd form has transformed, [OC, C, 16]; the direct form's is [OC, C, K * K]
MIN_TILES = 32  # of 2 x 2 outputs: below, transforming a weight for one call costs more than it saves

unavailable_reasons = native.cpu_unavailable_reasons


def _weight_reasons(weight: Tensor) -> list[str]:
    """Return why a weight [OC, C, K, K] can't be these kernels'."""
    found = devices.not_cpu_reasons(weight)
    if weight.dtype != torch.float32:
        found.append(f"{str(weight.dtype).removeprefix('torch.')} is left to others")
    if weight.shape[0] % CHANNELS or weight.shape[1] % CHANNELS:
        found.append(f"channels must be multiples of {CHANNELS}, got {weight.shape[1]} and {weight.shape[0]}")
    return found


def _packed_reasons(weight: Tensor, stride: int) -> list[str]:
    """Return why a weight is not of :func:`pack_weight`, for convolutions of this stride."""
    fits = weight.dim() == 3 and weight.dtype == torch.float32 and weight.is_contiguous()
    if (
        fits
        and not (weight.shape[0] % CHANNELS or weight.shape[1] % CHANNELS)
        and (weight.shape[2] != 16 or stride == 1)
    ):
        return []
    return ["the weight is not packed for the native kernels"]


def is_winograd(weight: Tensor, stride: int) -> bool:
    """Return whether a weight [OC, C, K, K] takes the Winograd form."""
    return weight.shape[-1] == 3 and stride == 1


def unsupported_reasons(function: str, weight: Tensor, **rest: Any) -> list[str]:
    """Return why a call of any of the op's functions can't be served, or a weight can't be packed."""
    if function == PACK:
        return _weight_reasons(weight)
    if function in PACKED:
        return _packed_reasons(weight, rest["stride"])
    if has_large_product(function, weight=weight, **rest):
        return cpu.unavailable_reasons() + cpu.unsupported_reasons(function, weight, rest["x"])
    found = _weight_reasons(weight)
    if function == "conv_norm_act_bwd" and not is_winograd(weight, rest["stride"]):
        found.append("gradients are for 3 x 3 with stride 1, or for a large product")
    return found


def has_large_product(function: str, x: Tensor, weight: Tensor, stride: int, activation: str, **rest: Any) -> bool:
    """Return whether a call is served as in :mod:`.cpu`, with the extension's product in it."""
    return any(is_large(*size) for size in cpu.product_sizes(function, x, weight, stride, activation, **rest))


def slower_reasons(function: str, weight: Tensor, **rest: Any) -> list[str]:
    """Return why oneDNN is faster; a packed weight has its transform behind it."""
    if function == PACK or function in PACKED or has_large_product(function, weight=weight, **rest):
        return []
    if not is_winograd(weight, rest["stride"]):
        return ["the direct form is oneDNN's, and packing its weight for one call costs more"]
    images, height, width, _ = rest["x"].shape  # with stride 1 the gradient's too
    tiles = images * ((height + 1) // 2) * ((width + 1) // 2)
    return [] if tiles >= MIN_TILES else [f"{tiles} tiles don't pay for transforming the weight"]


def pack_weight(weight: Tensor, scale: Tensor, stride: int, turned: bool = False) -> Tensor:
    """Lay a weight [OC, C, K, K] out for images of any size.

    [OC, C, 16] if the Winograd form serves, else [OC, C, K * K]; three dimensions tell it from all other weights.

    Args:
        weight: fp32.
        scale: is folded in.
        stride: of the convolution.
        turned: for the convolution that takes gradients back: [C, OC, ...], turned by 180 degrees.
    """
    winograd = is_winograd(weight, stride)
    out_channels, channels, side, _ = weight.shape
    points = POINTS if winograd else side * side
    out = weight.new_empty(*((channels, out_channels) if turned else (out_channels, channels)), points)
    pack = torch.ops.hia_native.conv_winograd_weight if winograd else torch.ops.hia_native.conv_direct_weight
    pack(weight.contiguous(), scale.contiguous(), turned, out)
    return out


class PanelLayout(Layout):
    """The layout of these kernels, for images of any size."""

    name, by_size, writes_out = "native", False, True

    def __call__(self, weight: Tensor, scale: Tensor, stride: int, size: tuple[int, int], pad_rows: bool) -> Tensor:
        """Return :func:`pack_weight`'s."""
        return pack_weight(weight, scale, stride)

    def nbytes(self, weight: Tensor, stride: int) -> int:
        """Return those of the weight, or of its transform."""
        return weight.nbytes // 9 * POINTS if is_winograd(weight, stride) else weight.nbytes


LAYOUT = PanelLayout()


def kernel_size(weight_shape: torch.Size) -> int:
    """Return K of a weight, packed for these kernels or not."""
    if len(weight_shape) == 4:
        return weight_shape[2]
    return 1 if weight_shape[2] == 1 else 3


def convolve(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: int,
    activation: str,
    pad_rows: bool,
) -> Tensor:
    """Write ``act(conv(x) + shift + residual)`` to ``out``, which may be ``residual``; ``weight`` is packed."""
    x, relu = x.contiguous(), activation == "relu"
    if weight.shape[2] == POINTS:
        torch.ops.hia_native.conv_winograd(x, weight, shift, residual, pad_rows, relu, out)
    else:
        torch.ops.hia_native.conv_direct(x, weight, shift, residual, stride, pad_rows, relu, out)
    return torch.ops.aten.gelu_(out) if activation == "gelu" else out


def conv_norm_act_packed(
    x: Tensor, weight: Tensor, shift: Tensor, residual: Tensor | None, stride: int, activation: str, pad_rows: bool
) -> Tensor:
    """Return [N, OH, OW, OC] of x [N, IH, IW, C], with a weight of :func:`pack_weight`."""
    images, height, width, _ = x.shape
    rows = height - 1 if pad_rows else height - kernel_size(weight.shape)
    out = x.new_empty(images, rows // stride + 1, (width - 1) // stride + 1, weight.shape[0])
    residual = None if residual is None else residual.contiguous()
    return convolve(out, x, weight, shift.contiguous(), residual, stride, activation, pad_rows)


def conv_norm_act_packed_inplace(
    residual: Tensor, x: Tensor, weight: Tensor, shift: Tensor, stride: int, activation: str, pad_rows: bool
) -> None:
    """Write the result over ``residual``, which is contiguous."""
    convolve(residual, x, weight, shift.contiguous(), residual, stride, activation, pad_rows)


def conv_norm_act_packed_out(
    out: Tensor, x: Tensor, weight: Tensor, shift: Tensor, stride: int, activation: str, pad_rows: bool
) -> None:
    """Write the result to ``out``, which is contiguous."""
    convolve(out, x, weight, shift.contiguous(), None, stride, activation, pad_rows)


def conv_norm_act_fwd(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, stride: int, activation: str
) -> Tensor:
    """Return [N, OH, OW, OC] of x [N, IH, IW, C]."""
    if has_large_product("conv_norm_act", x, weight, stride, activation):
        return cpu.conv_norm_act_fwd(LARGE, x, weight, scale, shift, residual, stride, activation)
    packed = pack_weight(weight, scale, stride)
    return conv_norm_act_packed(x, packed, shift, residual, stride, activation, True)


def _image_gradient(dz: Tensor, x: Tensor, weight: Tensor, scale: Tensor, stride: int) -> Tensor:
    """Convolve with the weight turned by 180 degrees, its channels exchanged."""
    turned = pack_weight(weight, scale, stride, turned=True)
    return convolve(torch.empty_like(x), dz, turned, None, None, stride, "none", True)


def _weight_gradient(dz: Tensor, x: Tensor, weight: Tensor, stride: int, exact: bool) -> Tensor:
    """Add up sums of 64 tiles, exact in any case."""
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    torch.ops.hia_native.conv_winograd_weight_gradient(dz, x, out)
    return out


def conv_norm_act_bwd(
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
    """Do as :func:`cpu.conv_norm_act_bwd`, with these convolutions in place of oneDNN's."""
    if not is_winograd(weight, stride):
        args = (dout, x, weight, scale, shift, residual, out, stride, activation, output_mask)
        return cpu.conv_norm_act_bwd(LARGE, *args)
    parts = cpu.Parts(conv_norm_act_fwd, _image_gradient, _weight_gradient)
    return cpu.backward(parts, dout, x, weight, scale, shift, residual, out, stride, activation, output_mask)
