"""``cross_attention`` on the CPU, out of PyTorch's own kernels: matrix products around a softmax, or its flash kernel.

Values are free to read here, so each sequence is served by what was measured to be faster for its shape
(docs/cross_attention.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from ...core import devices, onednn
from ...core.fresh import reshaped

FLASH_HEAD_DIM, FLASH_KEYS = 128, 1024  # up to them the flash kernel is faster in fp32
MANY_SCORES = 2**24  # a head's scores in fp32 take 64 MiB: beyond it flash, which keeps none
MAX_FLASH_LSE = 2.0**10  # rounding it is an error of 2^-14 in the flash kernel's probabilities
GROUP_SCORES = 2**20  # scores of the heads that a thread works on together: 4 MiB, which caches hold

Rows = tuple[int, slice, slice]  # sequences of equal lengths, their queries, their keys


def unsupported_reasons(function: str, q: Tensor, **rest: Any) -> list[str]:
    """Return why a call can't be served; its tensors are of one device and dtype."""
    found = devices.not_cpu_reasons(q)
    return [*found, "float64 is left to the reference"] if q.dtype == torch.float64 else found


def _batches(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[Rows]:
    """Group neighbours of equal lengths: one call of the flash kernel serves them."""
    starts = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    lengths = [(end_q - q, end_k - k) for (q, k), (end_q, end_k) in pairwise(starts)]
    first = 0
    for _, equal in groupby(lengths):
        count = len(list(equal))
        (q, k), (end_q, end_k) = starts[first], starts[first + count]
        yield count, slice(q, end_q), slice(k, end_k)
        first += count


def _batched(x: Tensor, count: int, rows: slice) -> Tensor:
    """Return [count, H, L, D] fp32: the flash kernel's backward in fp16 takes 30 times as long."""
    x = x[rows].unflatten(0, (count, (rows.stop - rows.start) // count)).transpose(1, 2).float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Make [count * L, H, D] of x [count, H, L, D], without a copy if the heads lie as they should."""
    count, heads, length, dim = x.shape
    return reshaped(x.transpose(1, 2).to(dtype).contiguous(), count * length, heads, dim)


def _singles(batch: Rows) -> Iterator[tuple[slice, slice]]:
    """Return the batch's sequences one by one."""
    count, rows_q, rows_k = batch
    length_q, length_k = ((rows.stop - rows.start) // count for rows in (rows_q, rows_k))
    for i in range(count):
        start_q, start_k = rows_q.start + i * length_q, rows_k.start + i * length_k
        yield slice(start_q, start_q + length_q), slice(start_k, start_k + length_k)


def _scores_of(batch: Rows) -> tuple[int, int]:
    """Return the length of a sequence's keys and the number of a head's scores."""
    count, rows_q, rows_k = batch
    length_k = (rows_k.stop - rows_k.start) // count
    return length_k, (rows_q.stop - rows_q.start) // count * length_k


def _blocks(rows: slice, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, rows.stop)) for first in range(rows.start, rows.stop, step))


def _flash_wins(q: Tensor, batch: Rows) -> bool:
    length_k, scores = _scores_of(batch)
    if q.shape[1] == 0:  # without a head the flash kernel divides by zero
        return False
    if scores == 0 or scores > MANY_SCORES:
        return scores > 0
    small = q.shape[2] <= FLASH_HEAD_DIM and length_k <= FLASH_KEYS
    return small and _product_dtype(q.dtype) == torch.float32


def _head_groups(heads: int, scores: int) -> Iterator[slice]:
    share = max(1, GROUP_SCORES * torch.get_num_threads() // scores)
    return (slice(first, min(first + share, heads)) for first in range(0, heads, share))


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of products of p or ds: bf16 where the CPU multiplies it, which halves their time."""
    return dtype if dtype == torch.bfloat16 and onednn.multiplies_bf16() else torch.float32


def _heads_first(x: Tensor, rows: slice, heads: slice) -> Tensor:
    return x[rows, heads].transpose(0, 1)  # [heads, L, D]


def _product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Compute scale * a b of [heads, ., .]."""
    # a library may multiply an operand by it, which overflows sooner than the product, or not look at the operands
    if abs(scale) > 1 or _leaves_operands_out(scale):
        return torch.bmm(a, b).mul_(scale)
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def _product_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """Write a b of [heads, ., .] to out, where it lies: a fresh product costs a copy and its pages. Or add it."""
    a, b = onednn.whole_tiles(a, b)
    if add:
        out += torch.bmm(a, b)
    elif out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))


def _products_fwd(
    q: Tensor, k: Tensor, v: Tensor, batch: Rows, softmax_scale: float, out: Tensor, lse: Tensor | None
) -> None:
    dtype = _product_dtype(q.dtype)
    for rows_q, rows_k in _singles(batch):
        for heads in _head_groups(q.shape[1], _scores_of(batch)[1]):
            q_h, k_h = _heads_first(q, rows_q, heads).float(), _heads_first(k, rows_k, heads).float()
            p = _product(q_h, k_h.mT, softmax_scale)  # [heads, Lq, Lk], scores for now
            m_i = None if lse is None else p.amax(-1)
            torch.softmax(p, -1, out=p)
            if lse is not None and m_i is not None:  # the largest probability is 1 / sum(exp(scores - m_i))
                lse[heads, rows_q] = torch.where(m_i.isinf(), m_i, m_i - p.amax(-1).log_())  # its p is NaN
            _product_into(_heads_first(out, rows_q, heads), p.to(dtype), _heads_first(v, rows_k, heads).to(dtype))


def _flash_fwd(q: Tensor, k: Tensor, v: Tensor, batch: Rows, softmax_scale: float) -> tuple[Tensor, Tensor]:
    count, rows_q, rows_k = batch
    triple = _batched(q, count, rows_q), _batched(k, count, rows_k), _batched(v, count, rows_k)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*triple, scale=softmax_scale)
    out = _packed(out, q.dtype)
    lse = reshaped(lse.transpose(0, 1).contiguous(), *out.shape[1::-1])  # [H, count * Lq]
    if _is_suspect(lse):
        _mend_masked(q[rows_q], k[rows_k], v[rows_k], count, softmax_scale, out, lse)
    return out, lse


def _is_suspect(lse: Tensor) -> bool:
    """Tell whether a sum is 0, which the flash kernel gives what it takes for masked, or NaN, which it makes of inf."""
    return lse.numel() > 0 and not float(lse.abs().min()) > 0  # the least of any NaN is NaN


def _mend_masked(q: Tensor, k: Tensor, v: Tensor, count: int, softmax_scale: float, out: Tensor, lse: Tensor) -> None:
    """Compute again what the flash kernel took for masked: queries whose scores are all NaN or -inf.

    It gives them zeros and an lse of 0, which otherwise only a single key of score 0 has.
    """
    batch = (count, slice(0, q.shape[0]), slice(0, k.shape[0]))
    step = max(1, MANY_SCORES // _scores_of(batch)[0])  # queries whose scores fit, however many there are
    for rows_q, rows_k in _singles(batch):
        for rows in _blocks(rows_q, step):
            if _is_suspect(lse[:, rows]):
                _products_fwd(q, k, v, (1, rows, rows_k), softmax_scale, out, lse)


def _has_lost_digits(lse: Tensor) -> bool:
    """Tell whether lse is too large for exp(scores - lse), the flash kernel's backward, to be a probability."""
    size = lse.abs()
    return bool(((size > MAX_FLASH_LSE) & size.isfinite()).any())


def _leaves_operands_out(scale: float) -> bool:
    """Tell whether a library's product may not look at its operands, NaN among them or not, because of the factor."""
    return math.isnan(scale) or scale == 0


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    batches = list(_batches(cu_seqlens_q, cu_seqlens_k))
    if _leaves_operands_out(softmax_scale):
        q, softmax_scale = q * softmax_scale, 1.0
    if len(batches) == 1 and _flash_wins(q, batches[0]):
        return _flash_fwd(q, k, v, batches[0], softmax_scale)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32) if with_lse else None
    for batch in batches:
        _, rows_q, rows_k = batch
        if rows_k.start == rows_k.stop:
            out[rows_q] = 0
            if lse is not None:
                lse[:, rows_q] = float("-inf")
        elif _flash_wins(q, batch):
            out[rows_q], sums = _flash_fwd(q, k, v, batch, softmax_scale)
            if lse is not None:
                lse[:, rows_q] = sums
        elif rows_q.start < rows_q.stop:
            _products_fwd(q, k, v, batch, softmax_scale, out, lse)
    return out, lse


def cross_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
) -> Tensor:
    """Return out [Tq, H, D], dtype of ``q``."""
    return _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, with_lse=False)[0]


def cross_attention_with_lse_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Return out [Tq, H, D], lse [H, Tq] fp32."""
    return _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, with_lse=True)


def _probabilities(q: Tensor, k: Tensor, lse: Tensor, softmax_scale: float) -> Tensor:
    """Take the softmax of [heads, Lq, D], [heads, Lk, D] again, as the reference's backward does."""
    scores = _product(q.float(), k.float().mT, softmax_scale)
    infinite = lse == torch.inf
    rest = torch.exp(scores - lse) if infinite.any() else None
    p = torch.softmax(scores, -1, out=scores)
    return p if rest is None else torch.where(infinite, rest, p)


def _products_bwd(
    dout: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    stats: tuple[Tensor, Tensor],
    batch: Rows,
    softmax_scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    (q, k, v), (lse, delta), (dq, dk, dv) = qkv, stats, grads
    dtype = _product_dtype(q.dtype)
    length_k, scores = _scores_of(batch)
    for rows_q, rows_k in _singles(batch):
        for heads in _head_groups(q.shape[1], scores):
            k_h, v_h, dk_h, dv_h = (_heads_first(x, rows_k, heads) for x in (k, v, dk, dv))
            blocks = list(_blocks(rows_q, max(1, MANY_SCORES // length_k)))
            several = len(blocks) > 1
            sums = [torch.zeros(x.shape, dtype=torch.float32) if several else x for x in (dk_h, dv_h)]
            for rows in blocks:
                q_h, do_h = _heads_first(q, rows, heads), _heads_first(dout, rows, heads).to(q.dtype)
                p = _probabilities(q_h, k_h, lse[heads, rows, None], softmax_scale)
                ds = torch.baddbmm(delta[heads, rows, None], do_h.float(), v_h.float().mT, beta=-1)  # [heads, Lq, Lk]
                ds = ds.mul_(p).mul_(softmax_scale).to(dtype)
                _product_into(_heads_first(dq, rows, heads), ds, k_h.to(dtype))
                _product_into(sums[0], ds.mT, q_h.to(dtype), add=several)
                _product_into(sums[1], p.to(dtype).mT, do_h.to(dtype), add=several)
            if several:
                dk_h.copy_(sums[0])
                dv_h.copy_(sums[1])


def _flash_bwd(
    dout: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, batch: Rows, softmax_scale: float
) -> list[Tensor]:
    count, rows_q, rows_k = batch
    owners = (rows_q, rows_k, rows_k)
    triple = [_batched(x, count, rows) for x, rows in zip(qkv, owners, strict=True)]
    sums = lse[:, rows_q].unflatten(1, (count, -1)).transpose(0, 1)  # [count, H, Lq]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _batched(dout, count, rows_q), *triple, _batched(out, count, rows_q), sums, 0.0, False, scale=softmax_scale
    )
    return [_packed(grad, x.dtype) for grad, x in zip(grads, qkv, strict=True)]


def cross_attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v; by products where the flash kernel, which knows no ``dlse``, would be wrong."""
    qkv, dout = (q, k, v), dout.to(q.dtype)
    batches = list(_batches(cu_seqlens_q, cu_seqlens_k))
    by_products = (dlse is not None and bool(dlse.any())) or _leaves_operands_out(softmax_scale)

    def by_flash(batch: Rows) -> bool:
        return not by_products and _flash_wins(q, batch) and not _has_lost_digits(lse[:, batch[1]])

    if len(batches) == 1 and by_flash(batches[0]):
        dq, dk, dv = _flash_bwd(dout, qkv, out, lse, batches[0], softmax_scale)
        return dq, dk, dv
    delta = (dout.float() * out.float()).sum(-1).T  # [H, Tq]
    if dlse is not None:
        delta = delta - dlse
    dq, dk, dv = grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in qkv)
    for batch in batches:
        _, rows_q, rows_k = batch
        if rows_q.start == rows_q.stop or rows_k.start == rows_k.stop:
            dq[rows_q], dk[rows_k], dv[rows_k] = 0, 0, 0
        elif by_flash(batch):
            dq[rows_q], dk[rows_k], dv[rows_k] = _flash_bwd(dout, qkv, out, lse, batch, softmax_scale)
        else:
            _products_bwd(dout, qkv, (lse, delta), batch, softmax_scale, grads)
    return dq, dk, dv
