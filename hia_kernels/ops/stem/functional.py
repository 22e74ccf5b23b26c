"""The encoder's first feature map, from raw pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.checks import FLOATS, PIXELS, check_choice, check_devices, check_dtypes, check_shapes
from . import library as _library  # noqa: F401  (defines the ops)


def stem_reach(kernel: int, pool: int) -> int:
    """Return the pixels along an axis that one output looks at: the smallest image the stem takes."""
    return kernel + 2 * (pool - 1)


def stem(
    pixels: Tensor,
    window: Tensor,
    mean: Tensor,
    std: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    pool: int = 3,
) -> Tensor:
    """Window, normalise, convolve with stride 2, folded norm, ReLU, 3 x 3 stride-2 max-pool.

    ``p = clip((pixels - low) / (high - low), 0, 1)``, ``x_c = (p_c - mean_c) / std_c``, then
    ``maxpool(relu(scale * conv(x) + shift))``: ResNet's stem on raw radiographs. Padding is zero *after*
    normalisation, as in a network fed normalised images. A grey image stands for three equal channels, which
    is exact. Normalisation, scale, shift and ReLU in fp32.

    Args:
        pixels: [N, IH, IW, CP] uint8, uint16, fp16, bf16, fp32 or fp64, CP 1 (grey) or 3 (RGB); both sides at
            least :func:`stem_reach` pixels.
        window: [N, 2] fp32, (low, high) in units of the pixels, per image; low > high inverts
            (DICOM's MONOCHROME1). low == high is refused where values can be read for free (the CPU).
        mean:   [3] fp32, in units of the windowed pixel (0 to 1).
        std:    [3] fp32, likewise.
        weight: [OC, 3, K, K], K 3 or 7; fp32, fp16, bf16 or fp64: the compute and output dtype.
        scale:  [OC] fp32 (fp64 with fp64 ``weight``).
        shift:  [OC], dtype of ``scale``.
        pool:   3: the max-pool; 1: none.

    Returns:
        [N, PH, PW, OC] contiguous, dtype of ``weight``, PH = ceil(ceil(IH / 2) / 2) (ceil(IH / 2) for
        ``pool=1``); differentiable in weight, scale, shift, and in floating pixels.

    Raises:
        ValueError: shapes, devices, window or pool that don't fit. TypeError: unsupported or mixed dtypes.

    Cost: 2*N*OH*OW*OC*3*K*K FLOPs (a grey image needs a third, with its weights summed);
    N*IH*IW*CP * pixel bytes + N*PH*PW*OC * itemsize bytes.
    """
    op = "stem"
    check_choice(op, "pool", pool, (1, 3))
    check_dtypes(op, pixels=(pixels, PIXELS), weight=(weight, FLOATS))
    statistics = torch.float64 if weight.dtype == torch.float64 else torch.float32
    check_dtypes(op, cast=False, scale=(scale, statistics), shift=(shift, statistics))
    check_dtypes(op, cast=False, window=(window, torch.float32), mean=(mean, torch.float32), std=(std, torch.float32))
    dims = check_shapes(
        op,
        pixels=(pixels, "N IH IW CP"),
        window=(window, "N 2"),
        mean=(mean, "3"),
        std=(std, "3"),
        weight=(weight, "OC 3 K K"),
        scale=(scale, "OC"),
        shift=(shift, "OC"),
    )
    check_devices(op, pixels=pixels, window=window, mean=mean, std=std, weight=weight, scale=scale, shift=shift)
    check_choice(op, "weight's K", dims["K"], (3, 7))
    check_size(op, pixels, dims["K"], pool)
    return torch.ops.hia.stem(pixels, window, mean, std, weight, scale, shift, pool)


def check_size(op: str, pixels: Tensor, kernel: int, pool: int) -> None:
    """Raise ValueError where pixels have other channels than 1 or 3, or are smaller than the stem's reach."""
    _, height, width, channels = pixels.shape
    check_choice(op, "pixels' channels", channels, (1, 3))
    reach = stem_reach(kernel, pool)
    if min(height, width) < reach:
        raise ValueError(
            f"hia::{op}: pixels must be at least {reach} x {reach}, the stem's reach, got {height} x {width}; "
            "resize or pad the image"
        )
