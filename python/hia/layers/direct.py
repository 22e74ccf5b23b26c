"""The adapter's maths as the paper writes it, in plain PyTorch and image by image: what measurements are made with.

No form of :mod:`hia.layers.plan` is used, so what is measured doesn't depend on which of them ran. Weights are read
inside calls of the units that own them (:mod:`hia.unit`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .extractor import Extractor
from .injection import Injection


def exact(x: Tensor) -> Tensor:
    """Detach, in fp32 if it is less."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def conditioned_queries(extractor: Extractor, instruction: Tensor) -> tuple[Tensor, float | None]:
    """Condition queries on instructions [A, D1]: [A, M, H, d] for the attention, and what was added in ratio."""
    return extractor.inside(_conditioned_queries, extractor, instruction)


def _conditioned_queries(extractor: Extractor, instruction: Tensor) -> tuple[Tensor, float | None]:
    own = as_like(extractor.queries, instruction)
    queries, share = own.expand(instruction.shape[0], -1, -1), None
    if extractor.condition is not None:
        added = _linear(extractor.condition, instruction)
        queries, share = queries + added[:, None], ratio(added, own)
    q = _linear(extractor.q_proj, _norm(extractor.query_norm, queries))
    return q.unflatten(-1, (extractor.num_heads, extractor.head_dim)), share


def image_keys(extractor: Extractor, tokens: Tensor) -> Tensor:
    """Make keys of one image's features [N, C] -> [N, H, d], as written in the paper."""
    return extractor.inside(_image_keys, extractor, tokens)


def _image_keys(extractor: Extractor, tokens: Tensor) -> Tensor:
    (shared,) = extractor._shared
    if shared is not None:
        tokens = shared.inside(_linear, shared, tokens)
    latent = _norm(extractor.feature_norm, _linear(extractor.feature_projection, tokens))
    keys = _linear(extractor.kv_proj, latent).chunk(2, dim=-1)[0]
    return keys.unflatten(-1, (extractor.num_heads, extractor.head_dim))


def read(injection: Injection, visual: Tensor, extracted: Tensor) -> tuple[Tensor, float | None]:
    """Let one image's visual tokens [K, D1] read its extracted tokens [M, D]: [K, D], and the attention's entropy."""
    return injection.inside(_read, injection, visual, extracted)


def _read(injection: Injection, visual: Tensor, extracted: Tensor) -> tuple[Tensor, float | None]:
    heads = (injection.num_heads, injection.head_dim)
    q = _linear(injection.q_proj, _norm(injection.visual_norm, visual)).unflatten(-1, heads)
    kv = _linear(injection.kv_proj, _norm(injection.extracted_norm, extracted))
    k, v = kv.unflatten(-1, (2, *heads)).unbind(1)
    return attend(q, k, v)


def update(injection: Injection, tokens: Tensor) -> Tensor:
    """Project what was read, [K, D], to what is added to the visual rows, [K, D1]."""
    return injection.inside(_update, injection, tokens)


def _update(injection: Injection, tokens: Tensor) -> Tensor:
    added = _linear(injection.out_proj, tokens)
    return added if injection.gate is None else added * torch.tanh(as_like(injection.gate, added))


def attend(q: Tensor, k: Tensor, v: Tensor | None = None) -> tuple[Tensor, float | None]:
    """Attend in plain PyTorch, head by head: the weights of all heads of a large image would be gigabytes.

    Args:
        q: [Q, H, d]. k: [N, H, d]. v: [N, H, d], or None for the entropy alone.

    Returns:
        [Q, H * d], empty without v; and the weights' mean entropy over log N, None for one key.
    """
    outs, entropy = [], 0.0
    for head in range(q.shape[1]):
        logs = torch.log_softmax(q[:, head] @ k[:, head].mT * q.shape[-1] ** -0.5, dim=-1)  # [Q, N]
        weights = logs.exp()
        entropy -= float(torch.special.xlogy(weights, weights).sum(-1).mean()) / q.shape[1]
        if v is not None:
            outs.append(weights @ v[:, head])
    out = torch.cat(outs, dim=-1) if outs else q.new_empty(0)
    return out, entropy / math.log(k.shape[0]) if k.shape[0] > 1 else None


def mean_cosine(rows: Tensor) -> float | None:
    """Average the cosine over all pairs of rows [R, D]; rows of zeros have no direction. None without a pair."""
    lengths = torch.linalg.vector_norm(rows, dim=1)
    kept = lengths != 0  # NaN stays, to be seen
    count = int(kept.sum())
    if count < 2:
        return None
    total = (rows[kept] / lengths[kept, None]).sum(0, dtype=torch.float64)
    cosine = float(((total @ total) - count) / (count * (count - 1)))
    return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else cosine


def effective_rank(rows: Tensor) -> float | None:
    """Compute exp of the entropy of squared singular values over their sum, of rows [R, D]. None for zeros."""
    gram = rows.double() @ rows.double().mT
    if not bool(torch.isfinite(gram).all()):
        return math.nan
    energies = torch.linalg.eigvalsh(gram).clamp_min(0)
    if float(energies.sum()) == 0:
        return None
    shares = energies / energies.sum()
    return math.exp(-float(torch.special.xlogy(shares, shares).sum()))


def ratio(x: Tensor, y: Tensor) -> float:
    """Divide the root mean squares; infinite for a y of zeros."""
    above, below = (float(z.double().square().mean().sqrt()) for z in (x, y))
    return above / below if below != 0 else math.inf


def as_like(parameter: Tensor, like: Tensor) -> Tensor:
    """Bring a parameter to the device and dtype of what it acts on."""
    return parameter.to(like.device, like.dtype)


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, as_like(linear.weight, x), as_like(linear.bias, x))


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, as_like(norm.weight, x), as_like(norm.bias, x), norm.eps)
