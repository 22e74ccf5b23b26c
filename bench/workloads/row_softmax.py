"""``row_softmax``: the fp32 scores of one image's queries, every head's."""

from __future__ import annotations

from hia_kernels.ops.row_softmax import inputs
from hia_kernels.ops.row_softmax.reference import row_softmax_ref

from .cases import ABSORBING, LayerCase, in_absorbing_set
from .registry import OpEntry


def _shape(case: LayerCase, _role: str) -> inputs.Shape:
    return inputs.Shape(case.num_queries * case.config.num_heads, case.feature_lengths[0], wide_scores=True)


ENTRY = OpEntry(
    name="row_softmax", inputs=inputs, reference=row_softmax_ref, cases=ABSORBING, shape=_shape,
    in_set=in_absorbing_set, regression=inputs.Shape(1024, 196),
)  # fmt: skip
