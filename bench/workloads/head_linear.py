"""``head_linear``: through the keys' projection the queries, through the values' the results."""

from __future__ import annotations

from hia_kernels.ops.head_linear import inputs
from hia_kernels.ops.head_linear.reference import head_linear_ref

from .cases import ABSORBING, LayerCase, in_absorbing_set
from .registry import OpEntry


def _shape(case: LayerCase, role: str) -> inputs.Shape:
    config, queries = case.config, case.num_queries
    if role == "queries":
        return inputs.Shape(case.batch, queries, config.num_heads, config.head_dim, config.dim)
    return inputs.Shape(case.images, queries, config.num_heads, config.dim, config.head_dim, merge_heads=True)


ENTRY = OpEntry(
    name="head_linear",
    inputs=inputs,
    reference=head_linear_ref,
    cases=ABSORBING,
    roles=("queries", "results"),
    shape=_shape,
    in_set=in_absorbing_set,
    regression=inputs.Shape(2, 256, 4, 192, 768),
)
