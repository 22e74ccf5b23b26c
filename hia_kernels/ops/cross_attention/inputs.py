"""Arguments of :func:`hia_kernels.cross_attention` at a shape, and the cost of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.costs import in_mode
from ...core.draw import Draw
from ...core.varlen import cu_seqlens_from_lengths

DIFFERENTIABLE = ("q", "k", "v")
PARAMETERS = ()


@dataclass(frozen=True)
class Shape:
    """Sizes of a call.

    Attributes:
        lengths_q: queries of each sequence.
        lengths_k: keys of each sequence.
        heads: H.
        head_dim: D.
    """

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    heads: int = 2
    head_dim: int = 32


SMALL = Shape((3, 4), (5, 4))  # for a quick check


def packing(lengths_q: Sequence[int], lengths_k: Sequence[int], device: str = "cpu") -> dict[str, Any]:
    """Return the four arguments that describe the packing: cu_seqlens_q and _k [B + 1] int32, max_seqlen_q and
    _k in tokens."""
    return {
        "cu_seqlens_q": cu_seqlens_from_lengths(lengths_q, device),
        "cu_seqlens_k": cu_seqlens_from_lengths(lengths_k, device),
        "max_seqlen_q": max(lengths_q, default=0),
        "max_seqlen_k": max(lengths_k, default=0),
    }


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, strided: bool = False
) -> dict[str, Any]:
    """Draw q [Tq, H, D], k and v [Tk, H, D] of ``dtype``, by name beside their packing and the scale.

    k and v are the two halves of one projection's output, as in the layer: their rows lie 2*H*D apart.

    Args:
        shape: sizes.
        dtype: of q, k and v.
        device: of all tensors.
        seed: of the random numbers.
        strided: whether q is a view of a wider tensor too.
    """
    draw = Draw(dtype, device, seed, strided=strided)
    heads, head_dim = shape.heads, shape.head_dim
    k, v = draw.normal(sum(shape.lengths_k), 2, heads, head_dim).unbind(1)
    q = draw.data(sum(shape.lengths_q), heads, head_dim)
    packed = packing(shape.lengths_q, shape.lengths_k, device)
    return {"q": q, "k": k, "v": v, **packed, "softmax_scale": head_dim**-0.5}


def flops(shape: Shape, mode: str) -> int:
    """Count FLOPs, 2 for each multiply-add of the matrix products, each sequence by its own lengths.

    ``mode`` is "forward", "backward" or "both".
    """
    scores = sum(q * k for q, k in zip(shape.lengths_q, shape.lengths_k, strict=True))
    product = 2 * scores * shape.heads * shape.head_dim
    return in_mode(mode, 2 * product, 5 * product)  # backward: scores once more, and a gradient of each operand


def moved_bytes(shape: Shape, itemsize: int, mode: str) -> int:
    """Count the fewest bytes moved, at ``itemsize`` an element: inputs read, results and gradients written;
    backward reads out beside dout."""
    width = itemsize * shape.heads * shape.head_dim
    q, kv = sum(shape.lengths_q) * width, 2 * sum(shape.lengths_k) * width
    cu_seqlens = 2 * 4 * (len(shape.lengths_q) + 1)  # int32
    read = q + kv + cu_seqlens
    return in_mode(mode, read + q, read + 2 * q + (q + kv))
