"""``stem`` by csrc/cpu/stem.cpp, fp32: rows of the convolution wait in the cache for the pool, whose rows alone are
written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import devices, native
from . import cpu

OUTPUTS = 32  # channels come in multiples of it: the kernel's panels
PIXELS = (torch.uint8, torch.uint16, torch.float32)

unavailable_reasons = native.cpu_unavailable_reasons


def unsupported_reasons(function: str, pixels: Tensor, weight: Tensor, **rest: Any) -> list[str]:
    """Return why a call can't be served."""
    found = devices.not_cpu_reasons(weight)
    if weight.dtype != torch.float32:
        found.append(f"weights of {str(weight.dtype).removeprefix('torch.')} are left to others")
    if pixels.dtype not in PIXELS:
        found.append(f"pixels of {str(pixels.dtype).removeprefix('torch.')} are left to others")
    if weight.shape[0] % OUTPUTS:
        found.append(f"output channels must be a multiple of {OUTPUTS}, got {weight.shape[0]}")
    return found


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
    """Return [N, PH, PW, OC] of pixels [N, IH, IW, CP]."""
    images, height, width, channels = pixels.shape
    sides = [cpu.half(cpu.half(side)) if pool == 3 else cpu.half(side) for side in (height, width)]
    folded = cpu.fold(weight, scale, shift, mean, std, channels)
    taps = torch.cat([folded.weight.permute(0, 2, 3, 1).flatten(1), folded.ones.flatten(1)], dim=1)  # [OC, depth]
    panels = taps.view(-1, OUTPUTS, taps.shape[1]).transpose(1, 2).contiguous()
    out = weight.new_empty(images, *sides, weight.shape[0])
    torch.ops.hia_native.stem(
        pixels.contiguous(),
        window.contiguous(),
        panels,
        folded.bias,
        shift.contiguous(),
        folded.centre,
        weight.shape[-1],
        pool == 3,
        out,
    )
    return out
