"""Each head's own linear layer: what the absorbed forms multiply queries, keys, values and results by."""

from __future__ import annotations

from torch import Tensor

from ...core.call import call
from . import library as _library  # noqa: F401  (defines the ops)


def head_linear(x: Tensor, weight: Tensor, merge_heads: bool = False) -> Tensor:
    """Compute ``x[:, h] weight[h]^T`` of every head h.

    What absorbs a projection (DeepSeek-V2, arXiv 2405.04434, section 2.1.2; docs/plans.md): queries by W_k before the
    attention, its results by W_v behind it. The weight is never copied for the images, nor is the result to merge the
    heads. Deterministic, on a CPU for one number of threads (docs/conventions.md, Bits); accumulation in fp32 (fp64 for
    fp64) as far as the device's library has it.

    Args:
        x:      [n, H, R, C] fp32, fp16, bf16 or fp64: R rows of n images, for each of H heads; any strides.
        weight: [H, D, C], dtype of ``x``; any strides, best with rows or columns one after the other.
        merge_heads: lay the heads' results side by side.

    Returns:
        [n, H, R, D], or [n, R, H * D] with merged heads; contiguous, dtype of ``x``, differentiable in both.

    Raises:
        ValueError: shapes or devices that don't fit. TypeError: unsupported or mixed dtypes.

    Cost: 2*n*H*R*C*D FLOPs; (n*H*R*C + H*D*C + n*H*R*D) * itemsize bytes.
    """
    return call("head_linear", x, weight, merge_heads)
