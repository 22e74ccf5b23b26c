"""Kernels of ``row_softmax``: 13B's scores of 784, 3136 and 16384 features, and rows longer than a block holds."""

from __future__ import annotations

from ..compiled import Spec

FORWARD = "hia_kernels.ops.row_softmax.triton_fwd"
BACKWARD = "hia_kernels.ops.row_softmax.triton_bwd"


def _forward(scores: str, p: str, block_n: int, block_r: int, num_warps: int) -> Spec:
    signature = {"scores_ptr": f"*{scores}", "p_ptr": f"*{p}", "lse_ptr": "*fp32", "R": "i32", "N": "i32"}
    signature |= {"scale": "fp32", "stride_scores_r": "i32", "stride_p_r": "i32"}
    return Spec(
        f"row_softmax fwd n{block_n} {scores} to {p}", FORWARD, "_row_softmax_fwd_kernel", signature,
        {"BLOCK_R": block_r, "BLOCK_N": block_n}, num_warps, unaligned=("R",),
    )  # fmt: skip


def _backward(dp: str, p: str, block_n: int, block_r: int, num_warps: int) -> Spec:
    signature = {"dp_ptr": f"*{dp}", "p_ptr": f"*{p}", "dlse_ptr": "*fp32", "ds_ptr": f"*{p}", "R": "i32", "N": "i32"}
    signature |= {"scale": "fp32", "stride_dp_r": "i32", "stride_p_r": "i32", "stride_ds_r": "i32"}
    return Spec(
        f"row_softmax bwd n{block_n} {dp} to {p}", BACKWARD, "_row_softmax_bwd_kernel", signature,
        {"HAS_DLSE": True, "BLOCK_R": block_r, "BLOCK_N": block_n}, num_warps, unaligned=("R",),
    )  # fmt: skip


_LONG_FORWARD = {"scores_ptr": "*fp32", "p_ptr": "*bf16", "lse_ptr": "*fp32", "N": "i32", "scale": "fp32"}
_LONG_FORWARD |= {"stride_scores_r": "i32", "stride_p_r": "i32"}
_LONG_BACKWARD = {"dp_ptr": "*fp32", "p_ptr": "*bf16", "dlse_ptr": "*fp32", "ds_ptr": "*bf16", "N": "i32"}
_LONG_BACKWARD |= {"scale": "fp32", "stride_dp_r": "i32", "stride_p_r": "i32", "stride_ds_r": "i32"}

SPECS = [
    _forward("fp32", "bf16", 1024, 4, 4),
    _forward("fp32", "bf16", 4096, 1, 4),
    _forward("fp32", "bf16", 16384, 1, 16),
    _forward("fp32", "fp32", 16384, 1, 16),
    Spec(
        "row_softmax fwd long fp32 to bf16", FORWARD, "_row_softmax_long_fwd_kernel", _LONG_FORWARD,
        {"BLOCK_N": 4096}, 8, unaligned=("N",),
    ),
    _backward("fp32", "bf16", 1024, 2, 4),
    _backward("fp32", "bf16", 16384, 1, 16),
    _backward("fp32", "fp32", 16384, 1, 16),
    Spec(
        "row_softmax bwd long fp32 to bf16", BACKWARD, "_row_softmax_long_bwd_kernel", _LONG_BACKWARD,
        {"HAS_DLSE": True, "BLOCK_N": 4096}, 8, unaligned=("N",),
    ),
]  # fmt: skip
