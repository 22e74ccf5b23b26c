"""Kernels of ``norm_linear``: rows of the 13B host (5120) and of the widest allowed, tiles of the fused kernel."""

from __future__ import annotations

from ..compiled import Spec

FORWARD = "hia_kernels.ops.norm_linear.triton_fwd"
BACKWARD = "hia_kernels.ops.norm_linear.triton_bwd"


def _rows(dtype: str, block_c: int, num_warps: int) -> Spec:
    signature = {"x_ptr": f"*{dtype}", "norm_weight_ptr": "*fp32", "norm_bias_ptr": "*fp32", "row_idx_ptr": "*i64"}
    signature |= {"y_ptr": f"*{dtype}", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "R": "i32", "C": "i32", "eps": "fp32"}
    flags = {"HAS_IDX": True, "HAS_Y": True, "HAS_STATISTICS": True}
    return Spec(
        f"norm_linear rows c{block_c} {dtype}", FORWARD, "_norm_linear_rows_kernel", signature | {"stride_x_t": "i32"},
        flags | {"BLOCK_R": 1, "BLOCK_C": block_c}, num_warps, unaligned=("R",),
    )  # fmt: skip


def _fused(dtype: str, block_r: int, block_d: int, block_c: int, num_stages: int) -> Spec:
    signature = {"x_ptr": f"*{dtype}", "norm_weight_ptr": "*fp32", "norm_bias_ptr": "*fp32", "weight_ptr": f"*{dtype}"}
    signature |= {"bias_ptr": f"*{dtype}", "row_idx_ptr": "*i64", "out_ptr": f"*{dtype}", "R": "i32", "C": "i32"}
    signature |= {"D": "i32", "eps": "fp32", "stride_x_t": "i32", "stride_weight_d": "i32"}
    blocks = {"BLOCK_R": block_r, "BLOCK_D": block_d, "BLOCK_C": block_c}
    return Spec(
        f"norm_linear fused {block_r}x{block_d}x{block_c} {dtype}", FORWARD, "_norm_linear_fused_kernel", signature,
        {"HAS_BIAS": True, "HAS_IDX": True, **blocks}, 4, num_stages, uses_dot=dtype != "fp32", unaligned=("R",),
    )  # fmt: skip


def _dx(dtype: str, block_c: int, num_warps: int, **waived: str) -> Spec:
    signature = {"dy_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "norm_weight_ptr": "*fp32", "row_idx_ptr": "*i64"}
    signature |= {"dx_ptr": f"*{dtype}", "R": "i32", "C": "i32", "eps": "fp32", "stride_x_t": "i32"}
    return Spec(
        f"norm_linear dx c{block_c} {dtype}", BACKWARD, "_norm_linear_bwd_dx_kernel", signature,
        {"HAS_IDX": True, "BLOCK_C": block_c, "BLOCK_I": 512}, num_warps, unaligned=("R",), waived=waived,
    )  # fmt: skip


_DNORM = {"dy_ptr": "*bf16", "x_ptr": "*bf16", "row_idx_ptr": "*i64", "mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
_DNORM |= {"sums_ptr": "*fp32", "R": "i32", "C": "i32", "rows_each": "i32", "stride_x_t": "i32"}

SPECS = [
    _rows("bf16", 8192, 8),
    _rows("fp32", 16384, 16),
    _fused("bf16", 64, 64, 64, 3),
    _fused("bf16", 64, 128, 64, 3),
    _fused("fp32", 32, 32, 16, 2),
    _dx("bf16", 8192, 16),
    _dx("fp32", 16384, 16, sm_80="8 bytes: x, dy and norm_weight are 32 values each a thread of 128 registers"),
    Spec(
        "norm_linear dnorm bf16", BACKWARD, "_norm_linear_bwd_dnorm_kernel", _DNORM | {"stride_sums_part": "i32"},
        {"HAS_IDX": True, "BLOCK_R": 8, "BLOCK_C": 256}, unaligned=("R", "rows_each"),
    ),
]  # fmt: skip
