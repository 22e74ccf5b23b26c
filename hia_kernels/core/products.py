"""Matrix products of the CPU's rows of the tables: fp32, by oneDNN where a product is large, else by PyTorch's BLAS.

For inside an op: nothing here records gradients. Sizes, strides and threads alone decide what runs, so results repeat
bit for bit.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_FLOPS = 2**25  # a smaller product is over before oneDNN has begun; docs/linear.md


@lru_cache(maxsize=1)
def _missing() -> tuple[str, ...]:
    if not torch.backends.mkldnn.is_available():
        return ("torch was built without oneDNN",)
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ("this torch has no mkldnn::_linear_pointwise",)
    return ()


def unavailable_reasons() -> list[str]:
    """Why this build of torch has no oneDNN product."""
    return list(_missing())


def unsupported_reasons(*tensors: Tensor) -> list[str]:
    """Why these tensors, among which all devices and dtypes of a call occur, can't be multiplied here."""
    found: dict[str, None] = {}
    for tensor in tensors:
        if tensor.device.type != "cpu":
            found[f"tensors must be on the CPU, got {tensor.device}"] = None
        if tensor.dtype != torch.float32:
            found[f"{str(tensor.dtype).removeprefix('torch.')} is left to the reference"] = None
    return list(found)


def _gains(x: Tensor, weight: Tensor) -> bool:
    if unsupported_reasons(x, weight) or _missing() or not torch.backends.mkldnn.enabled:
        return False
    return 2 * x.shape[0] * x.shape[1] * weight.shape[0] >= LEAST_FLOPS


def _dense(matrix: Tensor) -> Tensor:
    """With rows or columns one after the other: of anything else oneDNN's plain loops are hundreds of times slower."""
    rows, columns = matrix.shape
    if matrix.stride() in ((columns, 1), (1, rows)):
        return matrix
    return matrix.new_empty(rows, columns).copy_(matrix)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``.

    Args:
        x:      [R, C]; any strides, any dtype, any device: what oneDNN doesn't gain from is ``F.linear``'s.
        weight: [D, C].
        bias:   [D] or None.

    Returns:
        [R, D], contiguous.
    """
    if not _gains(x, weight):
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, "none", [], "")


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of [R, K] and [K, D], contiguous."""
    return linear(a, b.mT)
