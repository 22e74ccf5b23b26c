"""Project the extracted result and add it to the visual tokens' rows of the hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.checks import FLOATS, check_devices, check_dtypes, check_shapes
from . import library as _library  # noqa: F401  (defines the ops)


def _check(op: str, hidden: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, row_idx: Tensor) -> None:
    check_dtypes(op, hidden=(hidden, FLOATS), row_idx=(row_idx, torch.int64))
    check_dtypes(op, update=(update, hidden.dtype), weight=(weight, hidden.dtype), bias=(bias, hidden.dtype))
    check_shapes(
        op,
        hidden=(hidden, "T C"),
        update=(update, "R D"),
        weight=(weight, "C D"),
        bias=(bias, "C"),
        row_idx=(row_idx, "R"),
    )
    check_devices(op, hidden=hidden, update=update, weight=weight, bias=bias, row_idx=row_idx)


def inject_rows(hidden: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, row_idx: Tensor) -> Tensor:
    """Add a projected update to selected rows: ``out[row_idx] = hidden[row_idx] + Linear(update)``.

    The end of HiA's injection, V + CrossAtten(V, Z) (paper, section 3, step 3), with the attention's output
    projection. Rows absent from ``row_idx`` are copied bit for bit.

    Args:
        hidden:  [T, C] fp32, fp16, bf16 or fp64.
        update:  [R, D], dtype of ``hidden``. ``R == 0`` is allowed.
        weight:  [C, D], dtype of ``hidden``.
        bias:    [C], dtype of ``hidden``, or None.
        row_idx: [R] int64 in ``[0, T)``, **unique**. Checked on the CPU; elsewhere only with ``HIA_DEBUG=1``,
            and duplicates are undefined.

    Returns:
        [T, C], dtype of ``hidden``; differentiable in everything but ``row_idx``.

    Raises:
        ValueError: shapes, devices or row indices that don't fit. TypeError: unsupported or mixed dtypes.

    Cost: 2*R*C*D FLOPs; (2*T*C + R*D + C*D) * itemsize bytes.
    """
    _check("inject_rows", hidden, update, weight, bias, row_idx)
    return torch.ops.hia.inject_rows(hidden, update, weight, bias, row_idx)


def inject_rows_(hidden: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, row_idx: Tensor) -> Tensor:
    """Do :func:`inject_rows` in place: only the selected rows are read and written. For inference.

    Args and errors as there; ``hidden`` must be contiguous.

    Returns:
        ``hidden`` itself.

    Raises:
        RuntimeError: gradients are recorded and an argument requires one.

    Cost: 2*R*C*D FLOPs; (2*R*C + R*D + C*D) * itemsize bytes.
    """
    op = "inject_rows_"
    _check(op, hidden, update, weight, bias, row_idx)
    if not hidden.is_contiguous():
        raise ValueError(f"hia::{op}: hidden must be contiguous, got strides {list(hidden.stride())}; use inject_rows")
    tensors = (hidden, update, weight) if bias is None else (hidden, update, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"hia::{op}: hidden must not be part of a gradient graph; use inject_rows when training")
    torch.ops.hia.inject_rows_(hidden, update, weight, bias, row_idx)
    return hidden
