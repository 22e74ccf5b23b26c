"""``conv_norm_act``: the encoder's convolutions, those that differ in shape."""

from __future__ import annotations

from hia_kernels.ops.conv_norm_act import inputs
from hia_kernels.ops.conv_norm_act.reference import conv_norm_act_ref

from .cases import SINGLE_IMAGES, ImageCase, halved, limited_on_cpu
from .registry import Edge, OpEntry, in_named_set

# a role's stage, kernel, stride, channels in and out in widths, residual
CONVOLUTIONS: dict[str, tuple[int, int, int, int, int, bool]] = {
    "stage1-3x3": (1, 3, 1, 1, 1, False),
    "stage1-expand": (1, 1, 1, 1, 4, True),
    "stage2-down": (1, 3, 2, 2, 2, False),
    "stage3-reduce": (3, 1, 1, 16, 4, False),
    "stage3-3x3": (3, 3, 1, 4, 4, False),
    "stage4-expand": (4, 1, 1, 8, 32, True),
}
WIDTHS = (64, 128, 256, 512)  # of ResNet-50's four stages


def _shape(case: ImageCase, role: str) -> inputs.Shape:
    stage, kernel, stride, channels_in, channels_out, residual = CONVOLUTIONS[role]
    in_size = halved(case.sizes[0], 1 + stage - (stride - 1))
    channels = (channels_in * case.width, channels_out * case.width)
    return inputs.Shape(in_size, 1, channels, kernel, stride, residual=residual)


def resnet50_shapes(side: int) -> list[inputs.Shape]:
    """List all convolutions behind the stem, each once, for a square image of ``side`` pixels."""
    found = []
    for stage, width in enumerate(WIDTHS):
        inside = halved((side, side), 2 + stage)
        before, stride, entering = (halved((side, side), 1 + stage), 2, 2 * width) if stage else (inside, 1, width)
        found += [
            inputs.Shape(inside, 1, (width, 4 * width), 1, residual=True),
            inputs.Shape(inside, 1, (4 * width, width), 1),
            inputs.Shape(inside, 1, (width, width), 3),
            inputs.Shape(before, 1, (entering, width), 1),
            inputs.Shape(before, 1, (width, width), 3, stride),
            inputs.Shape(before, 1, (entering, 4 * width), 1, stride),
        ]
    return list(dict.fromkeys(found))


EDGES = (
    Edge("3x3 gelu", inputs.Shape((56, 56), 1, (64, 64), activation="gelu", residual=True)),
    Edge(
        "3x3, frozen weight",
        inputs.Shape((56, 56), 1, (256, 256), residual=True),
        differentiable=("x", "scale", "shift", "residual"),
    ),
    # every stride and count is typed by its value: beyond 2^31 elements they are int64
    Edge("1x1 beyond 2^31 elements", inputs.Shape((6000, 6000), 1, (64, 256), 1, residual=True), differentiable=()),
    Edge("3x3 beyond 2^31 elements", inputs.Shape((6000, 6000), 1, (64, 64), residual=True)),
)
ENTRY = OpEntry(
    name="conv_norm_act",
    inputs=inputs,
    reference=conv_norm_act_ref,
    cases=SINGLE_IMAGES,
    roles=tuple(CONVOLUTIONS),
    shape=_shape,
    edges=EDGES,
    in_set=limited_on_cpu(in_named_set, "stage1-3x3", "stage2-down", "stage4-expand"),
    regression=inputs.Shape((28, 28), 2, (256, 256)),
)
