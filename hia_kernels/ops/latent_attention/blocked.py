"""Blocks of query rows: product, row softmax, product. The scores of one block are all that is ever held.

Rows of the table differ in what a block is made of. The products are plain and large: the vendor's (cuBLAS, MKL) or the
native kernel's. On a GPU the softmax between them is the op ``row_softmax``, which reads fp32 scores and writes
probabilities in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.products import BLAS, EVERY, LARGE, Products, Size

# Scores of a block, bytes: on the CPU they should stay in cache between the products, on a GPU a block must fill it.
BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}
MIN_ROWS = 128  # below it the products slow down


def _block_rows(rows: int, tokens: int, device: str) -> int:
    fitting = max(MIN_ROWS, BLOCK_BYTES.get(device, BLOCK_BYTES["cuda"]) // (4 * max(1, tokens)))
    blocks = -(-rows // fitting)
    return max(1, -(-rows // max(1, blocks)))  # of one size: a short last block reads all tokens for a few rows


def _computed(x: Tensor) -> Tensor:
    """Return it in the dtype of the products: the CPU has none for halves that keeps fp32 sums."""
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) else x


def _softmax_by_op(scores: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return probabilities [rows, N] in ``dtype``, log-sum-exp [rows]. Consumes the scores."""
    if scores.dtype == dtype:  # in place: no second block of scores
        return scores, torch.ops.hia.row_softmax_(scores, scale)
    return torch.ops.hia.row_softmax(scores, scale, dtype)


def _softmax_bwd_by_op(dp: Tensor, p: Tensor, scale: float) -> Tensor:
    """Return the gradient of the scores [rows, N], dtype of ``p``. Consumes ``dp``."""
    return torch.ops.hia.row_softmax_bwd(dp, p, scale)


def _softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Do as :func:`_softmax_by_op`, where scores and probabilities are of one dtype."""
    scores *= scale
    p = torch.softmax(scores, dim=-1)
    m_i = scores.amax(-1)
    # the largest probability is exp(largest score - lse): no second pass of exponentials; it is NaN if the score is inf
    return p, torch.where(m_i.isinf(), m_i, m_i - p.amax(-1).log_())


def _softmax_bwd(dp: Tensor, p: Tensor, scale: float) -> Tensor:
    """Do as :func:`_softmax_bwd_by_op`."""
    return torch._softmax_backward_data(dp, p, -1, dp.dtype).mul_(scale)


class Parts(NamedTuple):
    """The parts of a block: its products, (scores, scale, dtype) -> (p, lse) and (dp, p, scale) -> dscores."""

    products: Products
    softmax: Callable[..., tuple[Tensor, Tensor]]
    softmax_bwd: Callable[..., Tensor]

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Compute ``a b`` with an fp32 (fp64) result."""
        if a.dtype in (torch.float16, torch.bfloat16):
            return torch.mm(a, b, out_dtype=torch.float32)
        return self.products.product(a, b)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
        """Compute ``out = a b`` or ``out += a b``; without a second tensor where the dtypes agree."""
        if out.dtype == a.dtype:
            self.products.multiply(a, b, out, add=add)
        elif add:
            out += self.product(a, b)
        else:
            out.copy_(self.product(a, b))


GPU = Parts(BLAS, _softmax_by_op, _softmax_bwd_by_op)
CPU, NATIVE, NATIVE_FORCED = (Parts(products, _softmax, _softmax_bwd) for products in (BLAS, LARGE, EVERY))


def functions(parts: Parts) -> dict[str, Callable[..., Any]]:
    """Return the op's functions with blocks made of these parts."""
    return {
        "latent_attention": partial(latent_attention_fwd, parts),
        "latent_attention_bwd": partial(latent_attention_bwd, parts),
    }


def product_sizes(function: str, q: Tensor, lengths: Sequence[int], **rest: Any) -> list[Size]:
    """Return the products of each image's first block, than which none is larger."""
    _, queries, width = q.shape
    sizes: list[Size] = []
    for tokens in lengths if queries else ():
        rows = _block_rows(queries, tokens, q.device.type)
        sizes += [(rows, width, tokens), (rows, tokens, width)]
        if function == "latent_attention_bwd":
            sizes.append((tokens, rows, width))
    return sizes


def latent_attention_fwd(
    parts: Parts, q: Tensor, latent: Tensor, lengths: list[int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Return out [n, G, E] and lse [n, G] of q [n, G, E] and latent [T, E]."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(q.shape[:2], dtype=acc, device=q.device)
    for image, tokens in enumerate(_computed(latent).split(lengths)):
        if tokens.shape[0] == 0:
            out[image].zero_()
            lse[image].fill_(float("-inf"))
            continue
        step = _block_rows(q.shape[1], tokens.shape[0], q.device.type)
        for first in range(0, q.shape[1], step):
            rows = slice(first, first + step)
            scores = parts.product(_computed(q[image, rows]), tokens.mT)  # [rows, N]
            p, lse[image, rows] = parts.softmax(scores, softmax_scale, tokens.dtype)
            parts.multiply(p, tokens, out[image, rows])
    return out, lse


def latent_attention_bwd(
    parts: Parts,
    dout: Tensor,
    q: Tensor,
    latent: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: list[int],
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and latent; the scores are computed again."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dlatent = torch.empty_like(latent, memory_format=torch.contiguous_format)
    start = 0
    for image, tokens in enumerate(_computed(latent).split(lengths)):
        where = slice(start, start + tokens.shape[0])
        start = where.stop
        if tokens.shape[0] == 0:
            dq[image].zero_()
            continue
        sums = dlatent[where]  # [N, E]: blocks add up in fp32
        if sums.dtype != lse.dtype:
            sums = torch.empty(tokens.shape, dtype=lse.dtype, device=q.device)
        if q.shape[1] == 0:
            sums.zero_()
        step = _block_rows(q.shape[1], tokens.shape[0], q.device.type)
        for first in range(0, q.shape[1], step):
            rows = slice(first, first + step)
            queries, douts = _computed(q[image, rows]), _computed(dout[image, rows])
            p, _ = parts.softmax(parts.product(queries, tokens.mT), softmax_scale, tokens.dtype)
            ds = parts.softmax_bwd(parts.product(douts, tokens.mT), p, softmax_scale)
            parts.multiply(ds, tokens, dq[image, rows])
            parts.multiply(p.mT, douts, sums, add=first > 0)
            parts.multiply(ds.mT, queries, sums, add=True)
        if sums.dtype != dlatent.dtype:
            dlatent[where] = sums
    return dq, dlatent
