"""``norm_linear``: every norm with its projection in a layer."""

from __future__ import annotations

import torch

from hia_kernels.ops.norm_linear import inputs
from hia_kernels.ops.norm_linear.reference import norm_linear_ref

from .cases import LAYERS, LayerCase, in_plain_set, limited_on_cpu
from .registry import Edge, OpEntry


def _shape(case: LayerCase, role: str) -> inputs.Shape:
    dim = case.config.dim
    if role == "visual":
        return inputs.Shape(case.tokens, case.visual_runs, case.hidden_size, dim)
    tokens, out = {
        "queries": (case.batch * case.num_queries, dim),
        "features": (sum(case.feature_lengths), 2 * dim),
        "extracted": (case.images * case.num_queries, 2 * dim),
    }[role]
    return inputs.Shape(tokens, None, dim, out)


EDGES = (
    Edge("16384 channels", inputs.Shape(1300, 1152, 16384, 1024), "fp32"),
    Edge("64 rows", inputs.Shape(1300, 64, 1024, 1024), differentiable=()),
    # the norm's parameters stay in fp32
    Edge(
        "autocast", inputs.Shape(1300, 1152, 5120, 1024, norm_dtype=torch.float32), function=torch.ops.hia.norm_linear
    ),
)
ENTRY = OpEntry(
    name="norm_linear",
    inputs=inputs,
    reference=norm_linear_ref,
    cases=LAYERS,
    roles=("queries", "features", "visual", "extracted"),
    shape=_shape,
    edges=EDGES,
    in_set=limited_on_cpu(in_plain_set, "features", "visual"),
    regression=inputs.Shape(392, None, 2048, 768),
    trained=("x", "weight"),
)
