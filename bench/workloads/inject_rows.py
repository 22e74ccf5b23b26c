"""``inject_rows``: the update of the visual tokens."""

from __future__ import annotations

import torch

from hia_kernels.ops.inject_rows import inputs
from hia_kernels.ops.inject_rows.reference import inject_rows_ref

from .cases import LAYERS, LayerCase, in_plain_set
from .registry import Edge, OpEntry


def _shape(case: LayerCase, _role: str) -> inputs.Shape:
    return inputs.Shape(case.tokens, case.visual_runs, case.hidden_size, case.config.dim)


EDGES = (
    Edge("64 rows", inputs.Shape(1300, 64, 5120, 1280), differentiable=()),
    # the residual stream stays in fp32
    Edge(
        "autocast", inputs.Shape(1300, 1152, 5120, 1280, hidden_dtype=torch.float32), function=torch.ops.hia.inject_rows
    ),
)
ENTRY = OpEntry(
    name="inject_rows",
    inputs=inputs,
    reference=inject_rows_ref,
    cases=LAYERS,
    shape=_shape,
    in_set=in_plain_set,
    edges=EDGES,
    regression=inputs.Shape(1212, ((0, 1152),), 768, 768),
    trained=("update", "weight"),
)
