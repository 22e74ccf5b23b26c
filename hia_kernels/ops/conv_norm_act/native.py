"""``conv_norm_act`` by csrc/cpu/conv_norm_act.cpp: 3 x 3 convolutions of stride 1 by Winograd's F(2 x 2, 3 x 3), fp32.

16 multiplications make four outputs where the direct form takes 36 (docs/conv_norm_act.md), in the forward and in both
gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import native
from . import cpu

CHANNELS = 32  # both channel counts are multiples of it: the kernels' panels
POINTS = 4  # along each axis of a transformed weight, [OC, C, 4, 4]: its layout is the kernels' own
FEWEST_TILES = 32  # of 2 x 2 outputs: below, transforming a weight for one call costs more than it saves

unavailable_reasons = native.cpu_unavailable_reasons


def packing_unsupported_reasons(weight: Tensor, stride: int) -> list[str]:
    """Why a weight [OC, C, K, K] can't be transformed."""
    found = []
    if weight.device.type != "cpu":
        found.append(f"tensors must be on the CPU, got {weight.device}")
    if weight.dtype != torch.float32:
        found.append(f"{str(weight.dtype).removeprefix('torch.')} is left to others")
    if weight.shape[-1] != 3 or stride != 1:
        found.append(f"it is for 3 x 3 with stride 1, got {weight.shape[-1]} x {weight.shape[-1]} with stride {stride}")
    if weight.shape[0] % CHANNELS or weight.shape[1] % CHANNELS:
        found.append(f"channels must be multiples of {CHANNELS}, got {weight.shape[1]} and {weight.shape[0]}")
    return found


def is_transformed(weight: Tensor) -> bool:
    """Whether a packed weight is this backend's."""
    return weight.shape[-1] == POINTS


def unsupported_reasons(*args: Any) -> list[str]:
    """Of the arguments of any of the op's functions."""
    if isinstance(args[-1], bool):
        return [] if is_transformed(cpu.packed_weight(args)) else ["the weight is packed for oneDNN"]
    if isinstance(args[-1], list):  # the backward: dout, x, weight, ..., stride, activation, mask
        return packing_unsupported_reasons(args[2], args[-3])
    return packing_unsupported_reasons(args[1], args[-2])


def slower_reasons(*args: Any) -> list[str]:
    """Why oneDNN is faster; a packed weight has its transform behind it."""
    if isinstance(args[-1], bool):
        return []
    images, height, width, _ = args[0].shape  # the image's and the gradient's are one
    tiles = images * ((height + 1) // 2) * ((width + 1) // 2)
    return [] if tiles >= FEWEST_TILES else [f"{tiles} tiles don't pay for transforming the weight"]


def _transformed(weight: Tensor, scale: Tensor, turned: bool = False) -> Tensor:
    out_channels, channels = weight.shape[:2]
    out = weight.new_empty(*((channels, out_channels) if turned else (out_channels, channels)), POINTS, POINTS)
    torch.ops.hia_native.conv3x3_weight(weight.contiguous(), scale.contiguous(), turned, out)
    return out


def pack_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """[OC, C, 3, 3], [OC] -> [OC, C, 4, 4]; for images of any size."""
    return _transformed(weight, scale)


def _convolve(
    x: Tensor, transformed: Tensor, shift: Tensor | None, residual: Tensor | None, activation: str, pad_rows: bool,
    out: Tensor,
) -> Tensor:  # fmt: skip
    torch.ops.hia_native.conv3x3(x.contiguous(), transformed, shift, residual, pad_rows, activation == "relu", out)
    return torch.ops.aten.gelu_(out) if activation == "gelu" else out


def conv_norm_act_packed(
    x: Tensor, weight: Tensor, shift: Tensor, residual: Tensor | None, stride: int, activation: str, pad_rows: bool
) -> Tensor:
    """[N, IH, IW, C] -> [N, OH, OW, OC], with a weight of :func:`pack_weight`."""
    images, height, width, _ = x.shape
    out = x.new_empty(images, height if pad_rows else height - 2, width, weight.shape[0])
    residual = None if residual is None else residual.contiguous()
    return _convolve(x, weight, shift.contiguous(), residual, activation, pad_rows, out)


def conv_norm_act_packed_inplace(
    residual: Tensor, x: Tensor, weight: Tensor, shift: Tensor, stride: int, activation: str, pad_rows: bool
) -> None:
    """Writes the result over ``residual``, which is contiguous."""
    _convolve(x, weight, shift.contiguous(), residual, activation, pad_rows, residual)


def conv_norm_act_fwd(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, stride: int, activation: str
) -> Tensor:
    """[N, IH, IW, C] -> [N, OH, OW, OC]."""
    return conv_norm_act_packed(x, _transformed(weight, scale), shift, residual, stride, activation, True)


def _image_gradient(dz: Tensor, x: Tensor, weight: Tensor, scale: Tensor, stride: int) -> Tensor:
    """The convolution with the weight turned by 180 degrees, its channels exchanged."""
    return _convolve(dz, _transformed(weight, scale, turned=True), None, None, "none", True, torch.empty_like(x))


def _weight_gradient(dz: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    torch.ops.hia_native.conv3x3_weight_gradient(dz, x, out)
    return out


def conv_norm_act_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, out: Tensor,
    stride: int, activation: str, output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`cpu.conv_norm_act_bwd`, whose products are exchanged for these."""
    products = cpu.Products(conv_norm_act_fwd, _image_gradient, _weight_gradient)
    return cpu.backward(products, dout, x, weight, scale, shift, residual, out, stride, activation, output_mask)
