"""Triton backward of ``inject_rows``: the rows' gradients are gathered and summed; cuBLAS multiplies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core import onednn, tuning
from ...core.tuning import cdiv


@triton.jit(do_not_specialize=["R", "rows_per_split"])
def _inject_rows_bwd_gather_kernel(
    dout_ptr,  # [T, C]
    row_idx_ptr,  # [R] int64
    drows_ptr,  # [R, C], only with HAS_ROWS
    sums_ptr,  # [splits, C] fp32, only with HAS_SUMS
    R,
    C,
    rows_per_split,
    stride_dout_t,
    HAS_ROWS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store drows = dout[row_idx] and its sums over rows_per_split rows; grid = (cdiv(C, BLOCK_C), splits)."""
    split = tl.program_id(1).to(tl.int64)  # int64: T * C may exceed 2**31
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    end = tl.minimum((split + 1) * rows_per_split, R)
    for start in range(0, rows_per_split, BLOCK_R):
        offs_r = split * rows_per_split + start + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        mask_r = offs_r < end
        mask = mask_r[:, None] & mask_c[None, :]
        rows = tl.load(row_idx_ptr + offs_r, mask=mask_r, other=0)  # [BLOCK_R]
        drows = tl.load(dout_ptr + rows[:, None] * stride_dout_t + offs_c[None, :], mask=mask, other=0.0)
        drows = drows.to(drows_ptr.dtype.element_ty)  # [BLOCK_R, BLOCK_C]; under autocast dout is fp32, drows is not
        if HAS_ROWS:
            tl.store(drows_ptr + offs_r[:, None] * C + offs_c[None, :], drows, mask=mask)
        if HAS_SUMS:
            sums += drows.to(tl.float32)
    if HAS_SUMS:
        tl.store(sums_ptr + split * C + offs_c, tl.sum(sums, axis=0), mask=mask_c)


def _gather(dout, row_idx, dtype, wants_rows, wants_sums):
    """Return dout[row_idx] in ``dtype`` and its sum over the rows in fp32; None where not wanted."""
    dout = dout if dout.stride(1) == 1 else dout.contiguous()
    R, C = row_idx.shape[0], dout.shape[1]
    # without rows the kernel still takes their dtype from the pointer
    drows = torch.empty(R if wants_rows else 0, C, dtype=dtype, device=dout.device)
    config = tuning.pick(
        "inject_rows", f"gather-c{tuning.bucket(C)}", dout.device, {"BLOCK_R": 4, "BLOCK_C": 512, "num_warps": 4}
    )
    splits = max(1, min(64, cdiv(R, 4 * config["BLOCK_R"])))
    sums = torch.empty(splits, C, dtype=torch.float32, device=dout.device) if wants_sums else None
    if C and (wants_rows or wants_sums):
        _inject_rows_bwd_gather_kernel[(cdiv(C, config["BLOCK_C"]), splits)](
            dout_ptr=dout,
            row_idx_ptr=row_idx.contiguous(),
            drows_ptr=drows,
            sums_ptr=sums,
            R=R,
            C=C,
            rows_per_split=cdiv(R, splits),
            stride_dout_t=dout.stride(0),
            HAS_ROWS=wants_rows,
            HAS_SUMS=wants_sums,
            **config,
            enable_fp_fusion=True,
        )
    return drows if wants_rows else None, None if sums is None else sums.sum(0)


def inject_rows_bwd(dout, update, weight, row_idx, output_mask):
    """Return the gradients of update, weight, bias; those not in ``output_mask`` are empty."""
    dupdate, dweight, dbias = (update.new_empty(0) for _ in range(3))
    drows, sums = _gather(dout, row_idx, update.dtype, any(output_mask[:2]), output_mask[2])
    if output_mask[0]:
        dupdate = onednn.matmul(drows, weight)
    if output_mask[1]:
        dweight = onednn.matmul(drows.mT, update)
    if output_mask[2]:
        dbias = sums.to(update.dtype)
    return dupdate, dweight, dbias
