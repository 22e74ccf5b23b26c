"""Matrix products of the CPU's rows of the tables: fp32, by the native extension where a product is large, else by
PyTorch's BLAS.

For inside an op: nothing here records gradients. Sizes, strides and the build alone decide what runs, so results repeat
bit for bit. oneDNN's product is as fast as the native one and not in use: its sums over thousands of terms lose more
digits than MKL's, which the bound on a layer's output has no room for (docs/linear.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native

LEAST_ROWS = 32  # fewer read the weight once, and nothing pays for packing it
LEAST_FLOPS = 2**25  # below, packing the operands costs what the better rate saves; docs/linear.md


def unsupported_reasons(*tensors: Tensor) -> list[str]:
    """Why these tensors, among which all devices and dtypes of a call occur, can't be multiplied here."""
    found: dict[str, None] = {}
    for tensor in tensors:
        if tensor.device.type != "cpu":
            found[f"tensors must be on the CPU, got {tensor.device}"] = None
        if tensor.dtype != torch.float32:
            found[f"{str(tensor.dtype).removeprefix('torch.')} is left to the reference"] = None
    return list(found)


def is_native(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear(x, weight)`` is the extension's."""
    rows, inner = x.shape
    if rows < LEAST_ROWS or 2 * rows * inner * weight.shape[0] < LEAST_FLOPS:
        return False
    return not (unsupported_reasons(x, weight) or native.cpu_unavailable_reasons())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``.

    Args:
        x:      [R, C]; any strides, any dtype, any device: what the extension doesn't do is ``F.linear``'s.
        weight: [D, C].
        bias:   [D] or None.

    Returns:
        [R, D], contiguous.
    """
    if not is_native(x, weight):
        return F.linear(x, weight, bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    torch.ops.hia_native.linear(x, weight, None if bias is None else bias.contiguous(), out, False)
    return out


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of [R, K] and [K, D], contiguous."""
    return linear(a, b.mT)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``out = a b``, or ``out += a b``.

    Args:
        a:   [R, K]; any strides.
        b:   [K, D]; any strides.
        out: [R, D], its rows or its columns one after the other.
        add: to what is there.
    """
    if out.stride(1) != 1:  # the same sum, transposed
        a, b, out = b.mT, a.mT, out.mT
    if out.stride(1) == 1 and a.shape[1] > 0 and is_native(a, b.mT):
        torch.ops.hia_native.linear(a, b.mT, None, out, add)
    elif add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)
