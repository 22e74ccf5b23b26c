"""``stem`` with a weight packed beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core import registration
from ...core.call import call
from ...core.checks import check_choice
from . import checks, library
from .library import PACK


def packing_unsupported_reasons(weight: Tensor) -> list[str]:
    """Return why a packed ``weight`` can't serve a call now; empty if it can.

    By the table, which a forced backend narrows; no autocast, outside torch.compile.
    """
    reasons = registration.packing_unsupported_reasons(weight.device.type)
    if reasons:
        return reasons
    row, rejected = library.BACKENDS.find(PACK, {"weight": weight})
    return rejected if row is None else []


@dataclass(frozen=True)
class PackedStem:
    """A stem's inference weights, made by :func:`pack_stem`: plain values, no parameters.

    Attributes:
        taps: [5, (K + 1)^2, OC], the weight by tap as the Triton kernels read it.
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

    def unsupported_reasons(self, pixels: Tensor) -> list[str]:
        """Return why it can't serve ``pixels`` now; empty if it can."""
        reasons = registration.packing_unsupported_reasons(pixels.device.type)
        if reasons:
            return reasons
        row, rejected = library.BACKENDS.find("stem_packed", {"pixels": pixels, "taps": self.taps})
        return rejected if row is None else []

    @property
    def nbytes(self) -> int:
        """Return the bytes it occupies beside the caller's tensors."""
        return self.taps.nbytes


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
        NotImplementedError: see :func:`packing_unsupported_reasons`. ValueError, TypeError: as :func:`stem`.
    """
    op = "stem_packed"
    check_choice(op, "pool", pool, checks.POOLS)
    sizes = checks.check_pack({"weight": weight, "mean": mean, "std": std, "scale": scale, "shift": shift})
    check_choice(op, "weight's K", sizes["K"], checks.KERNELS)
    row, _ = library.BACKENDS.find(PACK, {"weight": weight})
    reasons = packing_unsupported_reasons(weight)
    if row is None or reasons:
        raise NotImplementedError(f"hia::{op}: weight can't be packed: " + "; ".join(reasons))
    weight, scale, shift = weight.detach(), scale.detach(), shift.detach()
    taps = row.functions[PACK](weight, mean, std, scale if pool == 3 else None)
    return PackedStem(taps, mean, std, scale, shift, sizes["K"], pool)


def stem_packed(pixels: Tensor, window: Tensor, packed: PackedStem) -> Tensor:
    """Compute :func:`stem` with a weight packed beforehand, the same bits. For inference.

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
    if not isinstance(packed, PackedStem):
        raise TypeError(f"hia::stem_packed: packed must be of pack_stem, got {type(packed).__name__}")
    return call(
        "stem_packed",
        pixels,
        window,
        packed.mean,
        packed.std,
        packed.taps,
        packed.scale,
        packed.shift,
        packed.pool,
    )
