"""Triton kernel of ``row_dot``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_C = 1024


@triton.jit
def _row_dot_fwd_kernel(
    x_ptr,  # [R, C]
    y_ptr,  # [R, C]
    out_ptr,  # [R]
    C,
    stride_x_r,
    stride_y_r,
    BLOCK_C: tl.constexpr,
):
    """Compute one row a program; grid = (R,)."""
    row = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask = offs_c < C
        x = tl.load(x_ptr + row * stride_x_r + offs_c, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_C]
        acc += x * tl.load(y_ptr + row * stride_y_r + offs_c, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty))


def row_dot_fwd(x: Tensor, y: Tensor) -> Tensor:
    """Compute [R, C] and [R, C] -> [R]."""
    x, y = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (x, y))
    out = torch.empty(x.shape[0], dtype=x.dtype, device=x.device)
    if out.numel():
        _row_dot_fwd_kernel[x.shape[:1]](
            x_ptr=x,
            y_ptr=y,
            out_ptr=out,
            C=x.shape[1],
            stride_x_r=x.stride(0),
            stride_y_r=y.stride(0),
            BLOCK_C=BLOCK_C,
            enable_fp_fusion=True,
        )
    return out
