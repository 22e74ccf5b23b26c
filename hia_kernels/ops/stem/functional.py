"""From raw pixels to the encoder's first feature map."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core import autocast, backend, triton_support
from ...core.checks import FLOATS, PIXELS, check_choice, check_devices, check_dtypes, check_shapes
from . import library


def stem_reach(kernel: int, pool: int) -> int:
    """Pixels along an axis that one output looks at: the smallest image the stem takes."""
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
    _check_size(op, pixels, dims["K"], pool)
    return torch.ops.hia.stem(pixels, window, mean, std, weight, scale, shift, pool)


def _check_size(op: str, pixels: Tensor, kernel: int, pool: int) -> None:
    _, height, width, channels = pixels.shape
    check_choice(op, "pixels' channels", channels, (1, 3))
    reach = stem_reach(kernel, pool)
    if min(height, width) < reach:
        raise ValueError(
            f"hia::{op}: pixels must be at least {reach} x {reach}, the stem's reach, got {height} x {width}; "
            "resize or pad the image"
        )


@dataclass(frozen=True)
class PackedStem:
    """A stem's inference weights, made by :func:`pack_stem`: plain values, no parameters.

    Attributes:
        taps: [2, 4, (K + 1)^2, OC], the weight by tap as the Triton kernels read it.
        mean: [3].
        std: [3].
        scale: [OC].
        shift: [OC].
        kernel: K.
        pool: 3 or 1.
    """

    taps: Tensor = field(repr=False)
    mean: Tensor
    std: Tensor
    scale: Tensor = field(repr=False)
    shift: Tensor = field(repr=False)
    kernel: int
    pool: int

    @property
    def nbytes(self) -> int:
        """Bytes it occupies beside the caller's tensors."""
        return self.taps.nbytes


def stem_packing_reasons(weight: Tensor, pixels: Tensor | None = None) -> list[str]:
    """Why packed weights can't serve a call with ``weight``, and with ``pixels`` if given, now; empty if they can.

    They serve the Triton kernels: no other backend forced, no autocast, outside torch.compile.
    """
    found = triton_support.unavailable_reasons()
    found += library.triton_reasons(weight if pixels is None else pixels, weight)
    if backend.requested_backend() not in ("auto", "triton"):
        found.append(f"HIA_BACKEND={backend.requested_backend()} is forced")
    if autocast.is_enabled(weight.device.type):
        found.append("autocast is on")
    if torch.compiler.is_compiling():
        found.append("torch.compile is tracing")
    return found


@torch.no_grad()
def pack_stem(weight: Tensor, mean: Tensor, std: Tensor, scale: Tensor, shift: Tensor, pool: int = 3) -> PackedStem:
    """Lay the weight out by tap once, instead of in every call.

    Args:
        weight: [OC, 3, K, K] fp32, fp16 or bf16 on a CUDA device, K 3 or 7.
        mean:   [3] fp32, as in :func:`stem`; neither it nor any of the others may change afterwards.
        std:    [3] fp32.
        scale:  [OC] fp32.
        shift:  [OC] fp32.
        pool:   3 or 1.

    Returns:
        For :func:`stem_packed`.

    Raises:
        NotImplementedError: see :func:`stem_packing_reasons`. ValueError, TypeError: as :func:`stem`.
    """
    op = "stem_packed"
    check_choice(op, "pool", pool, (1, 3))
    check_dtypes(op, weight=(weight, FLOATS))
    dims = check_shapes(
        op, weight=(weight, "OC 3 K K"), mean=(mean, "3"), std=(std, "3"), scale=(scale, "OC"), shift=(shift, "OC")
    )
    check_choice(op, "weight's K", dims["K"], (3, 7))
    check_devices(op, weight=weight, mean=mean, std=std, scale=scale, shift=shift)
    reasons = stem_packing_reasons(weight)
    if reasons:
        raise NotImplementedError(f"hia::{op}: weight can't be packed: " + "; ".join(reasons))
    fp32 = torch.float32
    check_dtypes(op, mean=(mean, fp32), std=(std, fp32), scale=(scale, fp32), shift=(shift, fp32))
    weight, scale, shift = weight.detach(), scale.detach(), shift.detach()
    taps = library.pack_taps(weight, mean, std, scale if pool == 3 else None)
    return PackedStem(taps, mean, std, scale, shift, dims["K"], pool)


def stem_packed(pixels: Tensor, window: Tensor, packed: PackedStem) -> Tensor:
    """:func:`stem` with a weight packed beforehand, the same bits. For inference.

    Args:
        pixels: [N, IH, IW, CP], as there.
        window: [N, 2] fp32, as there.
        packed: of :func:`pack_stem`.

    Returns:
        [N, PH, PW, OC] contiguous, dtype of the weight that was packed.

    Raises:
        ValueError, TypeError: as :func:`stem`. RuntimeError: gradients are recorded.
        NotImplementedError: another backend is forced, or rows or columns of pixels lie too far apart.
    """
    op = "stem_packed"
    check_dtypes(op, cast=False, pixels=(pixels, PIXELS), window=(window, torch.float32))
    check_shapes(op, pixels=(pixels, "N IH IW CP"), window=(window, "N 2"))
    check_devices(op, pixels=pixels, window=window, packed=packed.taps)
    _check_size(op, pixels, packed.kernel, packed.pool)
    if torch.is_grad_enabled() and pixels.requires_grad:
        raise RuntimeError(f"hia::{op}: pixels must not be part of a gradient graph; use stem")
    return torch.ops.hia.stem_packed(
        pixels, window, packed.mean, packed.std, packed.taps, packed.scale, packed.shift, packed.pool
    )
