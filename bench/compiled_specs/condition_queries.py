"""Kernels of ``condition_queries``. With 16 samples a tile there is no wgmma or tcgen05: it streams the weight."""

from __future__ import annotations

from ..compiled import Spec

FORWARD = "hia_kernels.ops.condition_queries.triton_fwd"
BACKWARD = "hia_kernels.ops.condition_queries.triton_bwd"


def _forward(dtype: str, block_d: int, block_c: int) -> Spec:
    signature = dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr", "queries_ptr", "out_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("B", "M", "C", "D", "stride_hidden_t", "stride_weight_d"), "i32")
    blocks = {"BLOCK_B": 16, "BLOCK_D": block_d, "BLOCK_C": block_c, "BLOCK_M": 64}
    return Spec(
        f"condition_queries fwd {block_d}x{block_c} {dtype}", FORWARD, "_condition_queries_fwd_kernel",
        signature | {"row_idx_ptr": "*i64", "stride_queries_m": "i32"}, {"HAS_BIAS": True, **blocks},
        num_stages=4, unaligned=("B", "M"),
    )  # fmt: skip


_SUMS = {"dout_ptr": "*bf16", "parts_ptr": "*fp32", "dqueries_ptr": "*bf16", "B": "i32", "M": "i32", "D": "i32"}
_SUMS |= {"stride_dout_b": "i32", "stride_dout_m": "i32"}
_DHIDDEN = {"drows_ptr": "*bf16", "row_idx_ptr": "*i64", "dhidden_ptr": "*bf16", "B": "i32", "T": "i32", "C": "i32"}

SPECS = [
    _forward("bf16", 16, 256),
    _forward("bf16", 32, 128),
    _forward("fp32", 16, 32),
    Spec(
        "condition_queries bwd sums bf16", BACKWARD, "_condition_queries_bwd_sums_kernel", _SUMS,
        {"HAS_SHIFT": True, "HAS_QUERIES": True, "BLOCK_M": 16, "BLOCK_D": 128}, unaligned=("B", "M"),
    ),
    Spec(
        "condition_queries bwd dhidden bf16", BACKWARD, "_condition_queries_bwd_dhidden_kernel", _DHIDDEN,
        {"BLOCK_T": 4, "BLOCK_C": 512}, unaligned=("B", "T"),
    ),
]  # fmt: skip
