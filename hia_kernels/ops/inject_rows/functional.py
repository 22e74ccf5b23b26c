"""Project the extracted result and add it to the visual tokens' rows of the hidden states."""

from __future__ import annotations

from torch import Tensor

from ...core.call import call
from . import library as _library  # noqa: F401  (defines the ops)


def inject_rows(hidden: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, row_idx: Tensor) -> Tensor:
    """Add a projected update to selected rows: ``out[row_idx] = hidden[row_idx] + Linear(update)``.

    The end of HiA's injection, V + CrossAtten(V, Z) (paper, section 3, step 3), with the attention's output
    projection. Rows absent from ``row_idx`` are copied bit for bit.

    Args:
        hidden:  [T, C] fp32, fp16, bf16 or fp64.
        update:  [R, D], dtype of ``hidden``; beside fp32, fp16 or bf16 ``hidden`` also fp16 or bf16: autocast
            leaves the residual stream alone. ``R == 0`` is allowed.
        weight:  [C, D], dtype of ``update``.
        bias:    [C], dtype of ``update``, or None.
        row_idx: [R] int64 in ``[0, T)``, **unique**; or int32, which is converted. Checked on the CPU; elsewhere only
            with ``HIA_DEBUG=1``, and duplicates are undefined.

    Returns:
        [T, C], dtype of ``hidden``; differentiable in everything but ``row_idx``.

    Raises:
        ValueError: shapes, devices or row indices that don't fit. TypeError: unsupported or mixed dtypes.

    Cost: 2*R*C*D FLOPs; (2*T*C + R*D + C*D) * itemsize bytes.
    """
    return call("inject_rows", hidden, update, weight, bias, row_idx)


def inject_rows_(hidden: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, row_idx: Tensor) -> Tensor:
    """Do :func:`inject_rows` in place: only the selected rows are read and written. For inference.

    Args and errors as there; ``hidden`` may have any strides in which it does not overlap itself.

    Returns:
        ``hidden`` itself.

    Raises:
        RuntimeError: gradients are recorded and an argument requires one.

    Cost: 2*R*C*D FLOPs; (2*R*C + R*D + C*D) * itemsize bytes.
    """
    call("inject_rows_", hidden, update, weight, bias, row_idx)
    return hidden
