"""``linear``: the features' projection, and the attention's of its results."""

from __future__ import annotations

from torch import Tensor

from hia_kernels.ops.linear import inputs
from hia_kernels.ops.linear.reference import linear_ref

from .cases import LAYERS, LayerCase, in_plain_set, limited_on_cpu
from .registry import OpEntry


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear_ref(x, weight, bias)


def _shape(case: LayerCase, role: str) -> inputs.Shape:
    dim = case.config.dim
    rows, channels = {
        "features": (sum(case.feature_lengths), case.channels),
        "output": (case.images * case.num_queries, dim),
    }[role]
    return inputs.Shape(rows, channels, dim)


ENTRY = OpEntry(
    name="linear",
    inputs=inputs,
    reference=_reference,
    cases=LAYERS,
    roles=("features", "output"),
    shape=_shape,
    in_set=limited_on_cpu(in_plain_set, "features"),
    regression=inputs.Shape(392, 2048, 768),
)
