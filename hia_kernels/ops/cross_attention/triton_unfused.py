"""Parts that both passes of ``cross_attention`` share for wide heads and for fp32: attention that stores p.

A block of head_dim 640 needs accumulators and operands beyond a multiprocessor's registers and shared memory, and
recomputing the scores for every slice of columns would multiply the work. With few queries the probabilities are
smaller than the keys: they are written once, for a few heads at a time, and read by plain matrix products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...core import tuning
from ...core.triton_math import dot
from ...core.tuning import cdiv
from .triton_split import family_of, tuning_key

WORKSPACE = 64 * 2**20  # bytes of probabilities stored at once, about an H100's L2; at least one head's are


@triton.jit
def rows_product(
    a_ptr,  # first row
    b_ptr,  # first row
    mask_a,  # [BLOCK_A]
    mask_b,  # [BLOCK_B]
    stride_a,
    stride_b,
    D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute a b^T, [BLOCK_A, BLOCK_B] fp32, of rows of D channels, BLOCK_C at a time."""
    offs_c = tl.arange(0, BLOCK_C)
    a_ptrs = a_ptr + (tl.arange(0, BLOCK_A)[:, None] * stride_a + offs_c[None, :])  # [BLOCK_A, BLOCK_C]
    b_ptrs = b_ptr + (tl.arange(0, BLOCK_B)[:, None] * stride_b + offs_c[None, :])  # [BLOCK_B, BLOCK_C]
    acc = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for c in range(0, D, BLOCK_C):
        if D % BLOCK_C == 0:
            a = tl.load(a_ptrs + c, mask=mask_a[:, None], other=0.0)
            b = tl.load(b_ptrs + c, mask=mask_b[:, None], other=0.0)
        else:
            mask_c = (c + offs_c < D)[None, :]
            a = tl.load(a_ptrs + c, mask=mask_a[:, None] & mask_c, other=0.0)
            b = tl.load(b_ptrs + c, mask=mask_b[:, None] & mask_c, other=0.0)
        acc = dot(a, tl.trans(b), acc)
    return acc


def block_sizes(mode, q):
    """Return the tiles of a pass's products; fp32 has no matrix instructions, hence smaller ones.

    They do not depend on the batch: a sum in another order would change a sequence's bits.
    """
    block_d = max(16, tuning.bucket(q.shape[2]))
    if q.element_size() == 4:
        heuristic = {
            "BLOCK_M": 64,
            "BLOCK_N": 64,
            "BLOCK_C": 16,
            "BLOCK_K": 16,
            "BLOCK_D": min(64, block_d),
            "num_warps": 4,
            "num_stages": 3,
        }
    else:
        large = family_of(q.device) in ("hopper", "blackwell")
        heuristic = {
            "BLOCK_M": 128,
            "BLOCK_N": 128,
            "BLOCK_C": 64,
            "BLOCK_K": 128 if large and mode == "fwd" else 64,
            "BLOCK_D": min(128, block_d),
            "num_warps": 8,
            "num_stages": 3 if large else 2,
        }
    return tuning.pick("cross_attention", tuning_key(f"{mode}-unfused", q), q.device, heuristic)


def launch_options(config, *names):
    """Select the named block sizes of a configuration, with its warps and stages."""
    return {name: config[name] for name in (*names, "num_warps", "num_stages")}


def workspace_chunks(batch_heads, batch_head_bytes):
    """Divide the heads of all sequences evenly into chunks that fit the workspace: (first, count) of each."""
    chunks = max(1, min(batch_heads, cdiv(batch_heads * batch_head_bytes, WORKSPACE)))
    chunk = cdiv(batch_heads, chunks)
    return [(first, min(chunk, batch_heads - first)) for first in range(0, batch_heads, chunk)]
