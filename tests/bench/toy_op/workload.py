"""The entry of ``row_dot``."""

from __future__ import annotations

from bench.workloads import OpEntry, ShapeCase

from . import inputs
from .functional import row_dot
from .reference import row_dot_ref

ENTRY = OpEntry(
    name="row_dot",
    inputs=inputs,
    reference=row_dot_ref,
    function=row_dot,
    cases=(
        ShapeCase("large", inputs.Shape(4096, 5120), ("gpu",)),
        ShapeCase("small", inputs.Shape(33, 100), ("cpu", "quick", "dispatch")),
    ),
    regression=inputs.Shape(64, 768),
    trained=("x", "y"),
)
