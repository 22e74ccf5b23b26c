"""Triton forward of ``inject_rows``: a GEMM whose epilogue adds into rows, or cuBLAS's GEMM and a kernel that adds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import onednn, tuning
from ...core.triton_math import dot
from ...core.tuning import cdiv


@triton.jit(do_not_specialize=["R"])
def _inject_rows_fused_kernel(
    update_ptr,  # [R, D]
    weight_ptr,  # [C, D]
    bias_ptr,  # [C], only with HAS_BIAS
    row_idx_ptr,  # [R] int64, unique
    hidden_ptr,  # [T, C], read and written
    R,
    C,
    D,
    stride_update_r,
    stride_weight_c,
    stride_hidden_t,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_R: tl.constexpr,
):
    """Add update weight^T + bias to hidden[row_idx]; grid = (cdiv(R, BLOCK_R) * cdiv(C, BLOCK_C),)."""
    # grouped order: GROUP_R tiles of rows read a tile of the weight from L2 before the next column of tiles begins
    tiles_r, tiles_c = tl.cdiv(R, BLOCK_R), tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    first = pid // (GROUP_R * tiles_c) * GROUP_R
    height = tl.minimum(tiles_r - first, GROUP_R)
    pid_r = first + pid % (GROUP_R * tiles_c) % height
    pid_c = pid % (GROUP_R * tiles_c) // height

    offs_r = pid_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # int64: T * C may exceed 2**31
    offs_c = pid_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    mask_r, mask_c = offs_r < R, offs_c < C
    update_ptrs = update_ptr + offs_r[:, None] * stride_update_r + offs_d[None, :]  # [BLOCK_R, BLOCK_D]
    weight_ptrs = weight_ptr + offs_c[:, None] * stride_weight_c + offs_d[None, :]  # [BLOCK_C, BLOCK_D]
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, D, BLOCK_D):
        mask_d = start + offs_d < D
        update = tl.load(update_ptrs + start, mask=mask_r[:, None] & mask_d[None, :], other=0.0)
        weight = tl.load(weight_ptrs + start, mask=mask_c[:, None] & mask_d[None, :], other=0.0)
        acc = dot(update, tl.trans(weight), acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    acc = acc.to(update_ptr.dtype.element_ty).to(tl.float32)  # the projection is rounded, as cuBLAS's would be

    rows = tl.load(row_idx_ptr + offs_r, mask=mask_r, other=0)  # [BLOCK_R]
    hidden_ptrs = hidden_ptr + rows[:, None] * stride_hidden_t + offs_c[None, :]  # [BLOCK_R, BLOCK_C]
    mask = mask_r[:, None] & mask_c[None, :]
    acc += tl.load(hidden_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(hidden_ptrs, acc.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def _inject_rows_add_kernel(
    projected_ptr,  # [R, C]
    row_idx_ptr,  # [R] int64, unique
    hidden_ptr,  # [T, C], read and written
    R,
    C,
    stride_hidden_t,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add projected to hidden[row_idx]; grid = (cdiv(R, BLOCK_R), cdiv(C, BLOCK_C))."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # int64: T * C may exceed 2**31
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_r = offs_r < R
    mask = mask_r[:, None] & (offs_c < C)[None, :]
    rows = tl.load(row_idx_ptr + offs_r, mask=mask_r, other=0)  # [BLOCK_R]
    hidden_ptrs = hidden_ptr + rows[:, None] * stride_hidden_t + offs_c[None, :]  # [BLOCK_R, BLOCK_C]
    acc = tl.load(projected_ptr + offs_r[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    acc += tl.load(hidden_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_C]
    tl.store(hidden_ptrs, acc.to(hidden_ptr.dtype.element_ty), mask=mask)


def _fused_config(update, rows, channels):
    if update.dtype == torch.float32:
        heuristic = {"BLOCK_R": 32, "BLOCK_C": 32, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
    else:  # smaller tiles where larger ones would leave multiprocessors idle
        wide = cdiv(rows, 128) * cdiv(channels, 128) >= 128
        block_r, block_c = (128, 128) if wide else (64, 64)
        heuristic = {
            "BLOCK_R": block_r,
            "BLOCK_C": block_c,
            "BLOCK_D": 64,
            "num_warps": 8 if wide else 4,
            "num_stages": 3,
        }
    dtype = str(update.dtype).removeprefix("torch.")
    key = f"fused-r{tuning.bucket(rows)}-c{tuning.bucket(channels)}-{dtype}"
    return tuning.pick("inject_rows", key, update.device, {**heuristic, "GROUP_R": 8})


def _inner_contiguous(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _add_product(hidden, update, weight, bias, row_idx):
    update, weight = _inner_contiguous(update), _inner_contiguous(weight)
    (R, D), C = update.shape, weight.shape[0]
    config = _fused_config(update, R, C)
    grid = (cdiv(R, config["BLOCK_R"]) * cdiv(C, config["BLOCK_C"]),)
    _inject_rows_fused_kernel[grid](
        update_ptr=update,
        weight_ptr=weight,
        bias_ptr=None if bias is None else bias.contiguous(),
        row_idx_ptr=row_idx,
        hidden_ptr=hidden,
        R=R,
        C=C,
        D=D,
        stride_update_r=update.stride(0),
        stride_weight_c=weight.stride(0),
        stride_hidden_t=hidden.stride(0),
        HAS_BIAS=bias is not None,
        **config,
        enable_fp_fusion=True,
    )


def _add_rows(hidden, projected, row_idx):
    R, C = projected.shape
    heuristic = {"BLOCK_R": 4, "BLOCK_C": 512, "num_warps": 4}
    config = tuning.pick("inject_rows", f"add-c{tuning.bucket(C)}", hidden.device, heuristic)
    _inject_rows_add_kernel[(cdiv(R, config["BLOCK_R"]), cdiv(C, config["BLOCK_C"]))](
        projected_ptr=projected,
        row_idx_ptr=row_idx,
        hidden_ptr=hidden,
        R=R,
        C=C,
        stride_hidden_t=hidden.stride(0),
        **config,
        enable_fp_fusion=True,
    )


def _cublas_then_add(hidden, update, weight, bias, row_idx):
    _add_rows(hidden, onednn.linear(update, weight, bias), row_idx)


def _inplace(add, hidden, update, weight, bias, row_idx):
    if hidden.stride(1) != 1:
        hidden.copy_(_out_of_place(add, hidden, update, weight, bias, row_idx))
    elif update.shape[0] and weight.shape[0]:
        add(hidden, update, weight, bias, row_idx.contiguous())


def _out_of_place(add, hidden, update, weight, bias, row_idx):
    out = hidden.clone(memory_format=torch.contiguous_format)
    _inplace(add, out, update, weight, bias, row_idx)
    return out


def inject_rows_inplace(hidden, update, weight, bias, row_idx):
    """Write the rows of ``hidden``, in one kernel."""
    _inplace(_add_product, hidden, update, weight, bias, row_idx)


def inject_rows_fwd(hidden, update, weight, bias, row_idx):
    """Return a copy of hidden [T, C] with its rows written by one kernel."""
    return _out_of_place(_add_product, hidden, update, weight, bias, row_idx)


def inject_rows_cublas_inplace(hidden, update, weight, bias, row_idx):
    """Write the rows of ``hidden``: cuBLAS's GEMM, then a kernel that adds."""
    _inplace(_cublas_then_add, hidden, update, weight, bias, row_idx)


def inject_rows_cublas_fwd(hidden, update, weight, bias, row_idx):
    """Return a copy of hidden [T, C] with its rows written: cuBLAS's GEMM, then a kernel that adds."""
    return _out_of_place(_cublas_then_add, hidden, update, weight, bias, row_idx)
