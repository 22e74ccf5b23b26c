"""``cross_attention``: the queries ask the features, and the visual tokens what was extracted."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from torch import Tensor

from hia_kernels.ops.cross_attention import inputs
from hia_kernels.ops.cross_attention.reference import cross_attention_ref

from .batched import batched_attention
from .cases import LAYERS, LayerCase
from .registry import Edge, OpEntry


def _with_default_scale(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a function the op's own signature: what it fills in itself, an attention below is given."""

    @wraps(attention)
    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
    ) -> Tensor:
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        return attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)

    return attend


def _shape(case: LayerCase, role: str) -> inputs.Shape:
    return inputs.Shape(*case.attention_lengths(role), case.config.num_heads, case.config.head_dim)


def _two_images(heads: int, head_dim: int, keys: int = 784) -> inputs.Shape:
    return inputs.Shape((256, 256), (keys, keys), heads, head_dim)


EDGES = (
    *(Edge(f"head_dim {head_dim}", _two_images(8, head_dim)) for head_dim in (64, 96, 256)),  # 96: masked columns
    Edge("head_dim 272", _two_images(8, 272), "fp16"),
    # the released preset's, which pass through memory
    *(Edge(f"head_dim {head_dim}", _two_images(8, head_dim), "fp32") for head_dim in (512, 640)),
    # few heads and many keys: they are split
    *(Edge("4 heads of 128, 16384 keys", _two_images(4, 128, 16384), dtype) for dtype in ("bf16", "fp32")),
)
ENTRY = OpEntry(
    name="cross_attention",
    inputs=inputs,
    reference=_with_default_scale(cross_attention_ref),
    compilable=_with_default_scale(batched_attention),
    cases=LAYERS,
    roles=("extract", "inject"),
    shape=_shape,
    edges=EDGES,
    regression=inputs.Shape((256, 256), (196, 196), 6, 128),
    trained=("q", "k", "v"),
)
