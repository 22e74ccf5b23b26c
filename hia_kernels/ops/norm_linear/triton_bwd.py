"""Triton backward of ``norm_linear``: the gradients of LayerNorm (Ba, Kiros and Hinton 2016); cuBLAS multiplies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import onednn, tuning
from ...core.tuning import cdiv
from .triton_fwd import normed_rows

IDX_CHUNK = 512  # entries of row_idx compared at a time


@triton.jit
def _summed_dy(dy_ptr, row_idx_ptr, row, R, C, offs_c, mask_c, BLOCK_I: tl.constexpr):
    """Sum the rows of dy whose index is ``row``, in their order, and count them."""
    dy = tl.zeros(offs_c.shape, tl.float32)  # [BLOCK_C]
    count = tl.zeros((), tl.int32)
    offs_i = tl.arange(0, BLOCK_I)
    for start in range(0, R, BLOCK_I):
        named = tl.load(row_idx_ptr + start + offs_i, mask=start + offs_i < R, other=-1)  # [BLOCK_I]
        left = tl.where(named == row, offs_i, BLOCK_I)  # [BLOCK_I], positions still to be added
        matches = tl.sum((named == row).to(tl.int32), axis=0)
        count += matches
        for _ in range(matches):
            first = tl.min(left, axis=0)
            left = tl.where(left == first, BLOCK_I, left)
            source = dy_ptr + (start + first).to(tl.int64) * C
            dy += tl.load(source + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return dy, count


@triton.jit(do_not_specialize=["R"])
def _norm_linear_bwd_dx_kernel(
    dy_ptr,  # [R, C], gradient of the norm's output
    x_ptr,  # [T, C]
    norm_weight_ptr,  # [C]
    row_idx_ptr,  # [R] int64, only with HAS_IDX
    dx_ptr,  # [T, C]
    R,
    C,
    eps,
    stride_x_t,
    HAS_IDX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Compute one row of dx a program; grid = (T,).

    A row that is indexed twice has one norm, so its dy are summed first.
    """
    row = tl.program_id(0).to(tl.int64)  # int64: T * C may exceed 2**31
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    is_indexed = True
    if HAS_IDX:
        dy, count = _summed_dy(dy_ptr, row_idx_ptr, row, R, C, offs_c, mask_c, BLOCK_I)  # [BLOCK_C]
        is_indexed = count > 0
    else:
        dy = tl.load(dy_ptr + row * C + offs_c, mask=mask_c, other=0.0).to(tl.float32)  # [BLOCK_C]
    x = tl.load(x_ptr + row * stride_x_t + offs_c, mask=mask_c, other=0.0).to(tl.float32)  # [BLOCK_C]
    mean = tl.sum(x, axis=0) / C
    centred = tl.where(mask_c, x - mean, 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred, axis=0) / C + eps)
    normed = centred * rstd  # [BLOCK_C]
    dnormed = dy * tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)  # [BLOCK_C]
    along_ones = tl.sum(dnormed, axis=0) / C
    along_normed = tl.sum(dnormed * normed, axis=0) / C
    dx = rstd * (dnormed - along_ones - normed * along_normed)
    dx = tl.where(is_indexed, dx, 0.0)  # a row that is not indexed may hold NaN
    tl.store(dx_ptr + row * C + offs_c, dx.to(dx_ptr.dtype.element_ty), mask=mask_c)


@triton.jit(do_not_specialize=["R", "rows_per_split"])
def _norm_linear_bwd_dnorm_kernel(
    dy_ptr,  # [R, C]
    x_ptr,  # [T, C]
    row_idx_ptr,  # [R] int64, only with HAS_IDX
    mean_ptr,  # [R] fp32
    rstd_ptr,  # [R] fp32
    sums_ptr,  # [2, splits, C] fp32: of dy * normed, of dy
    R,
    C,
    rows_per_split,
    stride_x_t,
    stride_sums_part,
    HAS_IDX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum dy * normed and dy over rows_per_split rows; grid = (cdiv(C, BLOCK_C), splits)."""
    split = tl.program_id(1).to(tl.int64)  # int64: R * C may exceed 2**31
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    dgain = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dshift = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    end = tl.minimum((split + 1) * rows_per_split, R)
    for start in range(0, rows_per_split, BLOCK_R):
        offs_r = split * rows_per_split + start + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        mask_r = offs_r < end
        mask = mask_r[:, None] & mask_c[None, :]
        rows = offs_r
        if HAS_IDX:
            rows = tl.load(row_idx_ptr + offs_r, mask=mask_r, other=0)  # [BLOCK_R]
        mean = tl.load(mean_ptr + offs_r, mask=mask_r, other=0.0)  # [BLOCK_R]
        rstd = tl.load(rstd_ptr + offs_r, mask=mask_r, other=0.0)  # [BLOCK_R]
        dy = tl.load(dy_ptr + offs_r[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows[:, None] * stride_x_t + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        dgain += dy * (x - mean[:, None]) * rstd[:, None]  # [BLOCK_R, BLOCK_C]
        dshift += dy
    sums_ptrs = sums_ptr + split * C + offs_c
    tl.store(sums_ptrs, tl.sum(dgain, axis=0), mask=mask_c)
    tl.store(sums_ptrs + stride_sums_part, tl.sum(dshift, axis=0), mask=mask_c)


def _dx(dy, x, norm_weight, row_idx, eps):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    T, C = x.shape
    if T == 0 or C == 0:
        return dx
    block_c = max(16, tuning.bucket(C))
    heuristic = {"num_warps": min(16, max(4, block_c // 512))}
    config = tuning.pick("norm_linear", f"dx-c{block_c}", x.device, heuristic)
    _norm_linear_bwd_dx_kernel[(T,)](
        dy_ptr=dy,
        x_ptr=x,
        norm_weight_ptr=norm_weight.contiguous(),
        row_idx_ptr=row_idx,
        dx_ptr=dx,
        R=dy.shape[0],
        C=C,
        eps=eps,
        stride_x_t=x.stride(0),
        HAS_IDX=row_idx is not None,
        BLOCK_C=block_c,
        BLOCK_I=IDX_CHUNK,
        **config,
        enable_fp_fusion=True,
    )
    return dx


def _dnorm(dy, x, row_idx, mean, rstd):
    """Return the gradients of the norm's weight and bias, fp32."""
    R, C = dy.shape
    config = {"BLOCK_R": 8, "BLOCK_C": 256, "num_warps": 4}
    config = tuning.pick("norm_linear", f"dnorm-c{tuning.bucket(C)}", x.device, config)
    splits = max(1, min(64, cdiv(R, 4 * config["BLOCK_R"])))
    rows_per_split = cdiv(R, splits)
    sums = torch.empty(2, splits, C, dtype=torch.float32, device=x.device)
    if C:
        _norm_linear_bwd_dnorm_kernel[(cdiv(C, config["BLOCK_C"]), splits)](
            dy_ptr=dy,
            x_ptr=x,
            row_idx_ptr=row_idx,
            mean_ptr=mean,
            rstd_ptr=rstd,
            sums_ptr=sums,
            R=R,
            C=C,
            rows_per_split=rows_per_split,
            stride_x_t=x.stride(0),
            stride_sums_part=sums.stride(0),
            HAS_IDX=row_idx is not None,
            **config,
            enable_fp_fusion=True,
        )
    return sums[0].sum(0), sums[1].sum(0)  # two tensors: results of an op must not share memory


def norm_linear_bwd(dout, x, norm_weight, norm_bias, weight, row_idx, eps, output_mask):
    """Return the gradients of x, norm_weight, norm_bias, weight, bias; those not in ``output_mask`` are empty."""
    dx, dnorm_weight, dnorm_bias, dweight, dbias = (x.new_empty(0) for _ in range(5))
    x = x if x.stride(1) == 1 else x.contiguous()
    row_idx = None if row_idx is None else row_idx.contiguous()
    wants_norm, wants_weight = any(output_mask[:3]), output_mask[3]
    y = mean = rstd = None
    if wants_weight or wants_norm:
        y, mean, rstd = normed_rows(
            x, norm_weight, norm_bias, row_idx, eps, wants_y=wants_weight, wants_statistics=wants_norm
        )
    if wants_weight:
        dweight = onednn.matmul(dout.mT, y)
    if wants_norm:
        dy = onednn.matmul(dout, weight)  # [R, C]
        sums = _dnorm(dy, x, row_idx, mean, rstd)
        dnorm_weight, dnorm_bias = (
            part.to(like.dtype) for part, like in zip(sums, (norm_weight, norm_bias), strict=True)
        )
        if output_mask[0]:
            dx = _dx(dy, x, norm_weight, row_idx, eps)
    if output_mask[4]:
        dbias = dout.sum(0, dtype=torch.float32).to(x.dtype)
    return dx, dnorm_weight, dnorm_bias, dweight, dbias
