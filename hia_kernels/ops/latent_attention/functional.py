"""Attention over a latent that is key and value of every head: what is left once the projections are absorbed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...core.call import call
from . import library as _library  # noqa: F401  (defines the ops)


def latent_attention(q: Tensor, latent: Tensor, lengths: Sequence[int], softmax_scale: float) -> Tensor:
    """Compute ``softmax(softmax_scale * q latent^T) latent``, image by image.

    The absorbed form of multi-head attention (DeepSeek-V2, arXiv 2405.04434, section 2.1.2; docs/latent_attention.md):
    with K = F W_k and V = F W_v, head h's scores are (q_h W_k,h^T) F^T and its result is (P_h F) W_v,h. Neither K nor
    V is made, and the key bias drops out of the softmax. Heads and queries are rows alike: G = H * M. Scores, softmax
    and accumulation in fp32 (fp64 for fp64 inputs); the scores are not kept for the backward. Deterministic,
    on a CPU for one number of threads (docs/conventions.md, Bits).

    Args:
        q:       [n, G, E] fp32, fp16, bf16 or fp64: the absorbed queries of each image.
        latent:  [T, E], dtype of ``q``: the images' tokens, one image after the other.
        lengths: n tokens counts that add up to T. Ints, so that nothing waits for a device; 0 is allowed.
        softmax_scale: of the scores; that of the heads before absorption, e.g. ``head_dim ** -0.5``.

    Returns:
        [n, G, E], dtype of ``q``; zero where an image has no token. Differentiable in q and latent.

    Raises:
        ValueError: shapes, devices or lengths that don't fit. TypeError: unsupported or mixed dtypes,
            or lengths that are no ints.

    Cost: 4*T*G*E FLOPs; (2*n*G*E + T*E) * itemsize bytes, and G*N*4 of scores for the largest image at most.
    """
    return call("latent_attention", q, latent, lengths, softmax_scale)[0]
