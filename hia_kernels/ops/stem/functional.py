"""The encoder's first feature map, from raw pixels."""

from __future__ import annotations

from torch import Tensor

from ...core.call import call
from . import checks
from . import library as _library  # noqa: F401  (defines the ops)


def stem_reach(kernel: int, pool: int) -> int:
    """Return the pixels along an axis that one output looks at: the smallest image the stem takes."""
    return checks.reach(kernel, pool)


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
        mean:   [3] fp32, in units of the windowed pixel (0 to 1); finite.
        std:    [3] fp32, likewise; positive. Both are checked on the CPU; elsewhere only with ``HIA_DEBUG=1``.
        weight: [OC, 3, K, K], K 3 or 7; fp32, fp16, bf16 or fp64: the compute and output dtype.
        scale:  [OC] fp32 (fp64 with fp64 ``weight``).
        shift:  [OC], dtype of ``scale``.
        pool:   3: the max-pool; 1: none.

    Returns:
        [N, PH, PW, OC] contiguous, dtype of ``weight``, PH = ceil(ceil(IH / 2) / 2) (ceil(IH / 2) for
        ``pool=1``); differentiable in weight, scale, shift, and in floating pixels.

    Raises:
        ValueError: shapes, devices, window, mean, std or pool that don't fit. TypeError: unsupported or mixed dtypes.

    Cost: 2*N*OH*OW*OC*3*K*K FLOPs (a grey image needs a third, with its weights summed);
    N*IH*IW*CP * pixel bytes + N*PH*PW*OC * itemsize bytes.
    """
    return call("stem", pixels, window, mean, std, weight, scale, shift, pool)
