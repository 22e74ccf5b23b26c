"""``row_softmax``: the fp32 scores of one image's queries, every head's."""

from __future__ import annotations

from hia_kernels.ops.row_softmax import inputs
from hia_kernels.ops.row_softmax.reference import row_softmax_ref

from .cases import ABSORBING, LayerCase, in_absorbing_set
from .registry import Edge, OpEntry


def _shape(case: LayerCase, _role: str) -> inputs.Shape:
    return inputs.Shape(case.num_queries * case.config.num_heads, case.feature_lengths[0], wide_scores=True)


EDGES = tuple(
    Edge(f"{tokens} tokens", inputs.Shape(2048, tokens, wide_scores=True), dtype)
    for tokens, dtype in ((3136, "bf16"), (32768, "bf16"), (16384, "fp32"), (32768, "fp32"))
)
ENTRY = OpEntry(
    name="row_softmax",
    inputs=inputs,
    reference=row_softmax_ref,
    cases=ABSORBING,
    shape=_shape,
    edges=EDGES,
    in_set=in_absorbing_set,
    regression=inputs.Shape(1024, 196),
)
