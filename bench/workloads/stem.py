"""``stem``: one grey image, raw pixels."""

from __future__ import annotations

import torch

from hia_kernels.ops.stem import inputs
from hia_kernels.ops.stem.reference import stem_ref

from .cases import SINGLE_IMAGES, ImageCase
from .registry import Edge, OpEntry


def _shape(case: ImageCase, _role: str) -> inputs.Shape:
    return inputs.Shape(case.sizes[0], images=1, pixel_dtype=case.pixel_dtype, out_channels=case.width)


# 16-bit and float pixels, and the 3 x 3 of the strided encoder
_GREY_16 = inputs.Shape((1001, 1001), 1, torch.uint16, out_channels=64)
_PARAMETERS = ("weight", "scale", "shift")
EDGES = (
    Edge("grey, 16 bit", _GREY_16, differentiable=()),
    Edge("grey, 16 bit", _GREY_16, "fp32", differentiable=()),
    Edge("grey, float pixels", inputs.Shape((1001, 1001), 1, torch.float32, out_channels=64), "fp32"),
    Edge("rgb, float pixels", inputs.Shape((1001, 1001), 1, torch.float32, 3, out_channels=64)),
    Edge("rgb, 8 bit", inputs.Shape((1001, 1001), 1, torch.uint8, 3, out_channels=64), differentiable=()),
    Edge("3x3 without pool", inputs.Shape((1001, 1001), 1, torch.uint16, 1, 3, 64, 1), "fp16", _PARAMETERS),
)
ENTRY = OpEntry(
    name="stem",
    inputs=inputs,
    reference=stem_ref,
    cases=SINGLE_IMAGES,
    shape=_shape,
    edges=EDGES,
    regression=inputs.Shape((224, 224), out_channels=64),
)
