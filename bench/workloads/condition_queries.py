"""``condition_queries``: the learnable queries and each prompt's last instruction token."""

from __future__ import annotations

from hia_kernels.ops.condition_queries import inputs
from hia_kernels.ops.condition_queries.reference import condition_queries_ref

from .cases import LAYERS, LayerCase, in_plain_set
from .registry import Edge, OpEntry


def _shape(case: LayerCase, _role: str) -> inputs.Shape:
    return inputs.Shape(case.tokens, case.instruction_runs, case.hidden_size, case.num_queries, case.config.dim)


EDGES = (Edge("dim 16384", inputs.Shape(2800, 4, 8192, 256, 16384)),)
ENTRY = OpEntry(
    name="condition_queries",
    inputs=inputs,
    reference=condition_queries_ref,
    cases=LAYERS,
    shape=_shape,
    edges=EDGES,
    in_set=in_plain_set,
    regression=inputs.Shape(1212, ((1211, 1212),), 768, 256, 768),
)
