"""Matrix products of the CPU's rows of the tables, fp32: the native extension's, or PyTorch's BLAS.

For inside an op: nothing here records gradients. Rows that are made of products are a pair: ``native`` and ``cpu`` run
the same functions with other :class:`Products`. Sizes, strides and the build alone decide what runs, so results repeat
bit for bit with the same number of threads; the native ones with any, PyTorch's depend on it (docs/conventions.md,
"Bits"). oneDNN's product is as fast as the native one and not in use: its sums over thousands of terms lose more
digits than MKL's, which the bound on a layer's output has no room for (docs/linear.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import devices

MIN_ROWS = 32  # fewer read the weight once, and nothing pays for packing it
MIN_FLOPS = 2**25  # below, packing the operands costs what the better rate saves; docs/linear.md

Size = tuple[int, int, int]  # rows, terms of a sum, columns


def unsupported_tensors(*tensors: Tensor) -> list[str]:
    """Return why these tensors, among which all devices and dtypes of a call occur, can't be multiplied here."""
    found: list[str] = []
    for tensor in tensors:
        found += devices.not_cpu_reasons(tensor)
        if tensor.dtype != torch.float32:
            found.append(f"{str(tensor.dtype).removeprefix('torch.')} is left to the reference")
    return list(dict.fromkeys(found)) if found else found


def is_large(rows: int, inner: int, columns: int) -> bool:
    """Return whether the extension is faster at a product of that size."""
    return rows >= MIN_ROWS and 2 * rows * inner * columns >= MIN_FLOPS


@dataclass(frozen=True)
class Products:
    """One way to multiply: all by PyTorch, or some or all by the extension.

    Attributes:
        native: (rows, inner, columns) -> whether a product is the extension's; the others are PyTorch's.
    """

    native: Callable[[int, int, int], bool]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute ``x weight^T + bias``.

        Args:
            x:      [R, C]; any strides; what PyTorch multiplies is of any dtype, on any device.
            weight: [D, C].
            bias:   [D] or None.

        Returns:
            [R, D], contiguous.
        """
        if x.shape[1] == 0 or not self.native(x.shape[0], x.shape[1], weight.shape[0]):
            return F.linear(x, weight, bias)
        out = x.new_empty(x.shape[0], weight.shape[0])
        torch.ops.hia_native.linear(x, weight, None if bias is None else bias.contiguous(), out, False)
        return out

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Compute ``a b`` of [R, K] and [K, D], contiguous."""
        return self.linear(a, b.mT)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
        """Compute ``out = a b``, or ``out += a b``.

        Args:
            a:   [R, K]; any strides.
            b:   [K, D]; any strides.
            out: [R, D], its rows or its columns one after the other.
            add: to what is there.
        """
        if out.stride(1) != 1:  # the same sum, transposed
            a, b, out = b.mT, a.mT, out.mT
        if out.stride(1) == 1 and a.shape[1] > 0 and self.native(a.shape[0], a.shape[1], b.shape[1]):
            torch.ops.hia_native.linear(a, b.mT, None, out, add)
        elif add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)


BLAS = Products(lambda rows, inner, columns: False)
LARGE = Products(lambda rows, inner, columns: is_large(rows, inner, columns))  # the rest is PyTorch's
EVERY = Products(lambda rows, inner, columns: True)  # what a forced ``native`` takes


def layer_sizes(rows: int, channels: int, dim: int, output_mask: Sequence[bool] | None = None) -> list[Size]:
    """Return the products of a linear layer, or of its gradients.

    Args:
        rows: of the input.
        channels: of the input.
        dim: channels of the output.
        output_mask: whether gradients of the input and of the weight, its first two, are wanted; None: the layer.
    """
    if output_mask is None:
        return [(rows, channels, dim)]
    sizes = [(rows, dim, channels), (dim, rows, channels)]
    return [size for size, wanted in zip(sizes, output_mask[:2], strict=True) if wanted]


def slower_reasons(sizes: Callable[..., Iterable[Size]]) -> Callable[..., list[str]]:
    """Return the ``slower_reasons`` of a ``native`` row, whose ``cpu`` row multiplies what is small.

    Args:
        sizes: ``(function, **arguments)`` -> the products of a call.
    """

    why = f"no product of this call has {MIN_ROWS} rows and {MIN_FLOPS} FLOPs: PyTorch's are as fast"

    def reasons(function: str, **arguments: Any) -> list[str]:
        for size in sizes(function, **arguments):
            if is_large(*size):
                return []
        return [why]

    return reasons
