"""``conv_norm_act`` with weights packed beforehand: a cache of the layouts that the rows of its table ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from ...core import registration
from ...core.call import call
from . import checks, library
from .layout import PACK, Layout

KEPT_LAYOUTS = 3
KEPT_SIZES = 1024


def serving_layout(weight: Tensor) -> Layout | None:
    """Return how the row that serves packed weights now wants ``weight``; None if no row does."""
    row, _ = library.BACKENDS.find(PACK, {"weight": weight})
    return None if row is None else cast(Layout, row.functions[PACK])


def packing_unsupported_reasons(weight: Tensor) -> list[str]:
    """Return why packed weights can't serve a call with ``weight`` now; empty if they can.

    By the table, which a forced backend narrows; no autocast, and outside torch.compile (which packs by itself when its
    freezing is on).
    """
    reasons = registration.packing_unsupported_reasons(weight.device.type)
    if reasons:
        return reasons
    row, rejected = library.BACKENDS.find(PACK, {"weight": weight})
    return rejected if row is None else []


@dataclass(frozen=True)
class PackedConv:
    """Inference weights of one step, made by :func:`pack_conv`: plain values, no parameters.

    The row of the table that serves now says how the weight is laid out. The native kernels have one layout. oneDNN
    chooses one by the image's size, and reading another one's is slower than packing again; most sizes share one of a
    few layouts, so the last of those are kept, and which size takes which is remembered.

    Attributes:
        weight: [OC, C, K, K], the caller's: not copied, and read again for a new layout.
        scale: [OC].
        shift: [OC].
        stride: 1 or 2.
        layouts: packed weights by the description of their layout, at most :data:`KEPT_LAYOUTS`, oldest first.
            oneDNN's can't be indexed or saved.
        kinds: which of them images take, by the layout's name, height, width and whether rows are padded; at most
            :data:`KEPT_SIZES`.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    stride: int
    layouts: dict[bytes, Tensor] = field(default_factory=dict, repr=False)
    kinds: dict[tuple[Any, ...], bytes] = field(default_factory=dict, repr=False)

    def layout(self, height: int, width: int, pad_rows: bool = True) -> Tensor:
        """Return the scaled weight as the row that serves images of this size wants it.

        Raises:
            NotImplementedError: no row serves packed weights now.
        """
        layout = _layout_or_raise(self.weight)
        size = (layout.name, height, width, pad_rows) if layout.by_size else (layout.name,)
        kind = self.kinds.get(size)
        found = None if kind is None else self.layouts.pop(kind, None)
        if kind is None or found is None:
            packed = layout(self.weight, self.scale, self.stride, (height, width), pad_rows)
            kind = layout.describe(packed) or repr(size).encode()
            found = self.layouts.pop(kind, packed)
            while len(self.layouts) >= KEPT_LAYOUTS:
                self.layouts.pop(next(iter(self.layouts)))
            if len(self.kinds) >= KEPT_SIZES:
                self.kinds.clear()
            self.kinds[size] = kind
        self.layouts[kind] = found
        return found

    def unsupported_reasons(self) -> list[str]:
        """Return why it can't be used now; empty if it can."""
        return packing_unsupported_reasons(self.weight)

    def writes_out(self) -> bool:
        """Return whether :func:`conv_norm_act_packed_out` would write where it is told to now, without a copy."""
        layout = serving_layout(self.weight)
        return layout is not None and layout.writes_out

    @property
    def nbytes(self) -> int:
        """Return the bytes it occupies."""
        kept = sum(layout.numel() * layout.element_size() for layout in self.layouts.values())
        return kept + self.scale.nbytes + self.shift.nbytes


def _layout_or_raise(weight: Tensor) -> Layout:
    layout = serving_layout(weight)
    if layout is None:
        reasons = "; ".join(packing_unsupported_reasons(weight))
        raise NotImplementedError(f"hia::conv_norm_act_packed: weight can't be packed: {reasons}")
    return layout


def pack_conv(weight: Tensor, scale: Tensor, shift: Tensor, stride: int = 1) -> PackedConv:
    """Prepare to fold the scale into the weight and lay it out once, or once for a size, instead of in every call.

    Args:
        weight: [OC, C, K, K] fp32 or bf16 on the CPU; it must not change afterwards.
        scale:  [OC] fp32, likewise.
        shift:  [OC] fp32, likewise.
        stride: 1 or 2.

    Returns:
        For :func:`conv_norm_act_packed`.

    Raises:
        NotImplementedError: see :func:`packing_unsupported_reasons`. ValueError, TypeError: as :func:`conv_norm_act`.
    """
    checks.check_pack({"weight": weight, "scale": scale, "shift": shift, "stride": stride})
    reasons = packing_unsupported_reasons(weight)
    if reasons:
        raise NotImplementedError("hia::conv_norm_act_packed: weight can't be packed: " + "; ".join(reasons))
    return PackedConv(weight.detach(), scale.detach(), shift.detach(), stride)


def _laid_out(op: str, packed: PackedConv, x: Tensor, pad_rows: bool) -> Tensor:
    """Return the weight for images ``x``."""
    checks.check_image(op, x)
    if not isinstance(packed, PackedConv):
        raise TypeError(f"hia::{op}: packed must be of pack_conv, got {type(packed).__name__}")
    return packed.layout(x.shape[1], x.shape[2], pad_rows)


def conv_norm_act_packed(
    x: Tensor, packed: PackedConv, residual: Tensor | None = None, activation: str = "relu", pad_rows: bool = True
) -> Tensor:
    """Compute :func:`conv_norm_act` with weights packed beforehand. For inference.

    Args:
        x:        [N, IH, IW, C], dtype of the weight that was packed.
        packed:   of :func:`pack_conv`.
        residual: [N, OH, OW, OC], dtype of ``x``, or None.
        activation: "none", "relu" or "gelu".
        pad_rows: False: no zero rows above and below, for a strip that brings its neighbours' rows;
            OH = (IH - K) // stride + 1 then.

    Returns:
        [N, OH, OW, OC] contiguous.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit. RuntimeError: gradients are recorded.
        NotImplementedError: another backend is forced.
    """
    weight = _laid_out("conv_norm_act_packed", packed, x, pad_rows)
    return call("conv_norm_act_packed", x, weight, packed.shift, residual, packed.stride, activation, pad_rows)


def conv_norm_act_packed_(
    residual: Tensor, x: Tensor, packed: PackedConv, activation: str = "relu", pad_rows: bool = True
) -> Tensor:
    """Write :func:`conv_norm_act_packed`'s result over ``residual``, contiguous and apart from ``x``.

    Returns:
        ``residual`` itself.
    """
    weight = _laid_out("conv_norm_act_packed_", packed, x, pad_rows)
    call("conv_norm_act_packed_", residual, x, weight, packed.shift, packed.stride, activation, pad_rows)
    return residual


def conv_norm_act_packed_out(
    out: Tensor, x: Tensor, packed: PackedConv, activation: str = "relu", pad_rows: bool = True
) -> Tensor:
    """Write :func:`conv_norm_act_packed`'s result to a tensor that exists, contiguous and apart from ``x``.

    Fresh memory costs page faults. oneDNN makes its own result and copies it; :meth:`PackedConv.writes_out` tells.

    Returns:
        ``out`` itself.
    """
    weight = _laid_out("conv_norm_act_packed_out", packed, x, pad_rows)
    call("conv_norm_act_packed_out", out, x, weight, packed.shift, packed.stride, activation, pad_rows)
    return out
