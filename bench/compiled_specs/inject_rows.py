"""Kernels of ``inject_rows``: the fused product's tiles, and what goes with cuBLAS's product."""

from __future__ import annotations

from ..compiled import Spec

FORWARD = "hia_kernels.ops.inject_rows.triton_fwd"
BACKWARD = "hia_kernels.ops.inject_rows.triton_bwd"


def _fused(dtype: str, hidden: str, block: int, block_d: int, num_warps: int, num_stages: int) -> Spec:
    signature = {"update_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}", "row_idx_ptr": "*i64"}
    signature |= {"hidden_ptr": f"*{hidden}", "R": "i32", "C": "i32", "D": "i32", "stride_update_r": "i32"}
    signature |= {"stride_weight_c": "i32", "stride_hidden_t": "i32"}
    blocks = {"BLOCK_R": block, "BLOCK_C": block, "BLOCK_D": block_d, "GROUP_R": 8}
    return Spec(
        f"inject_rows fused {block}x{block}x{block_d} {dtype} into {hidden}", FORWARD, "_inject_rows_fused_kernel",
        signature, {"HAS_BIAS": True, **blocks}, num_warps, num_stages, uses_dot=dtype != "fp32", unaligned=("R",),
    )  # fmt: skip


_ADD = {"projected_ptr": "*bf16", "row_idx_ptr": "*i64", "hidden_ptr": "*bf16", "R": "i32", "C": "i32"}
_GATHER = {"dout_ptr": "*bf16", "row_idx_ptr": "*i64", "drows_ptr": "*bf16", "sums_ptr": "*fp32", "R": "i32"}
_GATHER |= {"C": "i32", "rows_each": "i32", "stride_dout_t": "i32"}

SPECS = [
    _fused("bf16", "bf16", 128, 64, 8, 3),
    _fused("bf16", "fp32", 128, 64, 8, 3),
    _fused("bf16", "bf16", 64, 64, 4, 3),
    _fused("fp32", "fp32", 32, 16, 4, 2),
    Spec(
        "inject_rows add bf16", FORWARD, "_inject_rows_add_kernel", _ADD | {"stride_hidden_t": "i32"},
        {"BLOCK_R": 4, "BLOCK_C": 512}, unaligned=("R",),
    ),
    Spec(
        "inject_rows bwd gather bf16", BACKWARD, "_inject_rows_bwd_gather_kernel", _GATHER,
        {"HAS_ROWS": True, "HAS_SUMS": True, "BLOCK_R": 4, "BLOCK_C": 512}, unaligned=("R", "rows_each"),
    ),
]  # fmt: skip
