"""Triton forward of ``norm_linear``: LayerNorm and product in one kernel, or LayerNorm before cuBLAS's product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import onednn, tuning
from ...core.triton_math import dot
from ...core.tuning import cdiv

BLOCK_M = 64  # rows of a fused tile: the fewest that wgmma and tcgen05 take


@triton.jit(do_not_specialize=["R"])
def _norm_linear_rows_kernel(
    x_ptr,  # [T, C]
    norm_weight_ptr,  # [C]
    norm_bias_ptr,  # [C]
    row_idx_ptr,  # [R] int64, only with HAS_IDX
    y_ptr,  # [R, C], only with HAS_Y
    mean_ptr,  # [R] fp32, only with HAS_STATISTICS
    rstd_ptr,  # [R] fp32, only with HAS_STATISTICS
    R,
    C,
    eps,
    stride_x_t,
    HAS_IDX: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalise whole rows of x[row_idx], mean first and then squares about it; grid = (cdiv(R, BLOCK_R),)."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # int64: T * C may exceed 2**31
    offs_c = tl.arange(0, BLOCK_C)
    mask_r, mask_c = offs_r < R, offs_c < C
    mask = mask_r[:, None] & mask_c[None, :]
    rows = offs_r
    if HAS_IDX:
        rows = tl.load(row_idx_ptr + offs_r, mask=mask_r, other=0)  # [BLOCK_R]

    x = tl.load(x_ptr + rows[:, None] * stride_x_t + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    # div_rn: a mere / C is a product, fused with the subtraction where no mean is stored, and y has other bits then
    mean = tl.div_rn(tl.sum(x, axis=1), tl.zeros((BLOCK_R,), tl.float32) + C)  # [BLOCK_R]
    centred = tl.where(mask, x - mean[:, None], 0.0)  # [BLOCK_R, BLOCK_C]
    rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / C + eps)  # [BLOCK_R]
    if HAS_STATISTICS:
        tl.store(mean_ptr + offs_r, mean, mask=mask_r)
        tl.store(rstd_ptr + offs_r, rstd, mask=mask_r)
    if HAS_Y:
        gain = tl.load(norm_weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)  # [BLOCK_C]
        shift = tl.load(norm_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)  # [BLOCK_C]
        y = centred * rstd[:, None] * gain[None, :] + shift[None, :]  # [BLOCK_R, BLOCK_C]
        tl.store(y_ptr + offs_r[:, None] * C + offs_c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _moments(x_ptrs, mask_r, C, eps, BLOCK_C: tl.constexpr):
    """Return mean and 1 / deviation of rows, read in chunks.

    Each chunk is summed about its own mean and merged by the update of Chan, Golub and LeVeque (1979).
    """
    offs_c = tl.arange(0, BLOCK_C)
    mean = tl.zeros(mask_r.shape, tl.float32)  # [BLOCK_R]
    squares = tl.zeros(mask_r.shape, tl.float32)  # [BLOCK_R]
    for start in range(0, C, BLOCK_C):
        mask = mask_r[:, None] & (start + offs_c < C)[None, :]
        x = tl.load(x_ptrs + start, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_C]
        count = tl.minimum(BLOCK_C, C - start).to(tl.float32)
        chunk_mean = tl.sum(x, axis=1) / count  # [BLOCK_R]
        centred = tl.where(mask, x - chunk_mean[:, None], 0.0)  # [BLOCK_R, BLOCK_C]
        delta = chunk_mean - mean
        fraction = count / (start + count)
        squares += tl.sum(centred * centred, axis=1) + delta * delta * (start * fraction)
        mean += delta * fraction
    return mean, 1 / tl.sqrt_rn(squares / C + eps)


@triton.jit(do_not_specialize=["R"])
def _norm_linear_fused_kernel(
    x_ptr,  # [T, C]
    norm_weight_ptr,  # [C]
    norm_bias_ptr,  # [C]
    weight_ptr,  # [D, C]
    bias_ptr,  # [D], only with HAS_BIAS
    row_idx_ptr,  # [R] int64, only with HAS_IDX
    out_ptr,  # [R, D]
    R,
    C,
    D,
    eps,
    stride_x_t,
    stride_weight_d,
    HAS_BIAS: tl.constexpr,
    HAS_IDX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute out = LayerNorm(x[row_idx]) weight^T + bias; grid = (cdiv(R, BLOCK_R) * cdiv(D, BLOCK_D),)."""
    tiles_d = tl.cdiv(D, BLOCK_D)  # innermost, so that neighbouring programs share rows of x in L2
    pid = tl.program_id(0)  # one axis: the others end at 65,535, which R may exceed
    offs_r = (pid // tiles_d).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # int64: T * C may exceed 2**31
    offs_d = (pid % tiles_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_c = tl.arange(0, BLOCK_C)
    mask_r, mask_d = offs_r < R, offs_d < D
    rows = offs_r
    if HAS_IDX:
        rows = tl.load(row_idx_ptr + offs_r, mask=mask_r, other=0)  # [BLOCK_R]
    x_ptrs = x_ptr + rows[:, None] * stride_x_t + offs_c[None, :]  # [BLOCK_R, BLOCK_C]
    weight_ptrs = weight_ptr + offs_d[:, None] * stride_weight_d + offs_c[None, :]  # [BLOCK_D, BLOCK_C]
    mean, rstd = _moments(x_ptrs, mask_r, C, eps, BLOCK_C)

    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, C, BLOCK_C):
        mask_c = start + offs_c < C
        x = tl.load(x_ptrs + start, mask=mask_r[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
        gain = tl.load(norm_weight_ptr + start + offs_c, mask=mask_c, other=0.0).to(tl.float32)  # [BLOCK_C]
        shift = tl.load(norm_bias_ptr + start + offs_c, mask=mask_c, other=0.0).to(tl.float32)  # [BLOCK_C]
        y = (x - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]  # [BLOCK_R, BLOCK_C]; 0 beyond C
        weight = tl.load(weight_ptrs + start, mask=mask_d[:, None] & mask_c[None, :], other=0.0)
        acc = dot(y.to(weight.dtype), tl.trans(weight), acc)

    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_r[:, None] * D + offs_d[None, :]  # [BLOCK_R, BLOCK_D]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_d[None, :])


def _inner_contiguous(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def normed_rows(x, norm_weight, norm_bias, row_idx, eps, *, wants_y=True, wants_statistics=False):
    """Return y [R, C] in the dtype of ``x``, mean and 1 / deviation [R] in fp32; None where not wanted."""
    x = _inner_contiguous(x)
    R, C = x.shape[0] if row_idx is None else row_idx.shape[0], x.shape[1]
    y = torch.empty(R, C, dtype=x.dtype, device=x.device) if wants_y else None
    mean, rstd = (torch.empty(R, dtype=torch.float32, device=x.device) if wants_statistics else None for _ in range(2))
    if R == 0 or C == 0:
        return y, mean, rstd
    block_c = max(16, tuning.bucket(C))
    heuristic = {"BLOCK_R": max(1, min(16, 2048 // block_c)), "num_warps": min(16, max(4, block_c // 1024))}
    config = tuning.pick("norm_linear", f"rows-c{block_c}", x.device, heuristic)
    _norm_linear_rows_kernel[(cdiv(R, config["BLOCK_R"]),)](
        x_ptr=x,
        norm_weight_ptr=norm_weight.contiguous(),
        norm_bias_ptr=norm_bias.contiguous(),
        row_idx_ptr=None if row_idx is None else row_idx.contiguous(),
        y_ptr=y,
        mean_ptr=mean,
        rstd_ptr=rstd,
        R=R,
        C=C,
        eps=eps,
        stride_x_t=x.stride(0),
        HAS_IDX=row_idx is not None,
        HAS_Y=wants_y,
        HAS_STATISTICS=wants_statistics,
        BLOCK_C=block_c,
        **config,
        enable_fp_fusion=True,
    )
    return y, mean, rstd


def _fused_config(x, rows, dim):
    if x.dtype == torch.float32:
        heuristic = {"BLOCK_R": 32, "BLOCK_D": 32, "BLOCK_C": 16, "num_warps": 4, "num_stages": 2}
    else:  # narrower tiles where wider ones would leave multiprocessors idle
        block_d = 128 if cdiv(rows, BLOCK_M) * cdiv(dim, 128) >= 128 else 64
        heuristic = {"BLOCK_R": BLOCK_M, "BLOCK_D": block_d, "BLOCK_C": 64, "num_warps": 4, "num_stages": 3}
    key = f"fused-r{tuning.bucket(rows)}-d{tuning.bucket(dim)}-{str(x.dtype).removeprefix('torch.')}"
    return tuning.pick("norm_linear", key, x.device, heuristic)


def norm_linear_fwd(x, norm_weight, norm_bias, weight, bias, row_idx, eps):
    """Return out, [R, D], of x [T, C]: one kernel."""
    x, weight = _inner_contiguous(x), _inner_contiguous(weight)
    R, D = x.shape[0] if row_idx is None else row_idx.shape[0], weight.shape[0]
    out = torch.empty(R, D, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if x.shape[1] == 0:  # no product, and no mean to take
        return out.zero_() if bias is None else out.copy_(bias)
    config = _fused_config(x, R, D)
    _norm_linear_fused_kernel[(cdiv(R, config["BLOCK_R"]) * cdiv(D, config["BLOCK_D"]),)](
        x_ptr=x,
        norm_weight_ptr=norm_weight.contiguous(),
        norm_bias_ptr=norm_bias.contiguous(),
        weight_ptr=weight,
        bias_ptr=None if bias is None else bias.contiguous(),
        row_idx_ptr=None if row_idx is None else row_idx.contiguous(),
        out_ptr=out,
        R=R,
        C=x.shape[1],
        D=D,
        eps=eps,
        stride_x_t=x.stride(0),
        stride_weight_d=weight.stride(0),
        HAS_BIAS=bias is not None,
        HAS_IDX=row_idx is not None,
        **config,
        enable_fp_fusion=True,
    )
    return out


def norm_linear_cublas_fwd(x, norm_weight, norm_bias, weight, bias, row_idx, eps):
    """Return out, [R, D], of x [T, C]: the norm's kernel, then cuBLAS's product."""
    y, _, _ = normed_rows(x, norm_weight, norm_bias, row_idx, eps)
    return onednn.linear(y, weight, bias)
