"""Blocks of query rows: product, row softmax, product. The scores of one block are all that is ever held.

The products are the vendor's (cuBLAS, MKL) or the native kernel's: they are plain and large. On a GPU the softmax
between them is the op ``row_softmax``, which reads fp32 scores and writes probabilities in the compute dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import products, triton_support

# Scores of a block, bytes: on the CPU they should stay in cache between the products, on a GPU a block must fill it.
BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}
LEAST_ROWS = 128  # below it the products slow down


def _block_rows(rows: int, tokens: int, device: str) -> int:
    fitting = max(LEAST_ROWS, BLOCK_BYTES.get(device, BLOCK_BYTES["cuda"]) // (4 * max(1, tokens)))
    blocks = -(-rows // fitting)
    return max(1, -(-rows // max(1, blocks)))  # of one size: a short last block reads all tokens for a few rows


def _computed(x: Tensor) -> Tensor:
    """In the dtype of the products: the CPU has none for halves that keeps fp32 sums."""
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) else x


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 (fp64) result."""
    if a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return products.product(a, b)


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``out = a b`` or ``out += a b``; without a second tensor where the dtypes agree."""
    if out.dtype == a.dtype:
        products.multiply(a, b, out, add=add)
    elif add:
        out += _product(a, b)
    else:
        out.copy_(_product(a, b))


def _softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Probabilities [rows, N] in ``dtype``, log-sum-exp [rows]. Consumes the scores."""
    if scores.device.type != "cpu" or triton_support.interpreted():
        if scores.dtype == dtype:  # in place: no second block of scores
            return scores, torch.ops.hia.row_softmax_(scores, scale)
        return torch.ops.hia.row_softmax(scores, scale, dtype)
    scores *= scale
    p = torch.softmax(scores, dim=-1)
    # the largest probability is exp(largest score - lse): no second pass of exponentials
    return p, scores.amax(-1) - p.amax(-1).log()


def _softmax_bwd(dp: Tensor, p: Tensor, scale: float) -> Tensor:
    """Gradient of the scores [rows, N], dtype of ``p``. Consumes ``dp``."""
    if dp.device.type != "cpu" or triton_support.interpreted():
        return torch.ops.hia.row_softmax_bwd(dp, p, scale)
    return torch._softmax_backward_data(dp, p, -1, dp.dtype).mul_(scale)


def latent_attention_blocked(
    q: Tensor, latent: Tensor, lengths: list[int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """[n, G, E], [T, E] -> out [n, G, E], lse [n, G]."""
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
            scores = _product(_computed(q[image, rows]), tokens.mT)  # [rows, N]
            p, lse[image, rows] = _softmax(scores, softmax_scale, tokens.dtype)
            _multiply(p, tokens, out[image, rows])
    return out, lse


def latent_attention_bwd_blocked(
    dout: Tensor, q: Tensor, latent: Tensor, out: Tensor, lse: Tensor, lengths: list[int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of q and latent; the scores are computed again."""
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
            p, _ = _softmax(_product(queries, tokens.mT), softmax_scale, tokens.dtype)
            ds = _softmax_bwd(_product(douts, tokens.mT), p, softmax_scale)
            _multiply(ds, tokens, dq[image, rows])
            _multiply(p.mT, douts, sums, add=first > 0)
            _multiply(ds.mT, queries, sums, add=True)
        if sums.dtype != dlatent.dtype:
            dlatent[where] = sums
    return dq, dlatent
