"""``inject_rows``: the update of the visual tokens."""

from __future__ import annotations

from hia_kernels.ops.inject_rows import inputs
from hia_kernels.ops.inject_rows.reference import inject_rows_ref

from .cases import LAYERS, LayerCase, in_plain_set
from .registry import OpEntry


def _shape(case: LayerCase, _role: str) -> inputs.Shape:
    return inputs.Shape(case.tokens, case.visual_runs, case.hidden_size, case.config.dim)


ENTRY = OpEntry(
    name="inject_rows", inputs=inputs, reference=inject_rows_ref, cases=LAYERS, shape=_shape, in_set=in_plain_set,
    regression=inputs.Shape(1212, ((0, 1152),), 768, 768), trained=("update", "weight"),
)  # fmt: skip
