"""``stem``: one grey image, raw pixels."""

from __future__ import annotations

from hia_kernels.ops.stem import inputs
from hia_kernels.ops.stem.reference import stem_ref

from .cases import SINGLE_IMAGES, ImageCase
from .registry import OpEntry


def _shape(case: ImageCase, _role: str) -> inputs.Shape:
    return inputs.Shape(case.sizes[0], images=1, pixel_dtype=case.pixel_dtype, out_channels=case.width)


ENTRY = OpEntry(
    name="stem", inputs=inputs, reference=stem_ref, cases=SINGLE_IMAGES, shape=_shape,
    regression=inputs.Shape((224, 224), out_channels=64),
)  # fmt: skip
