"""The comparison that ``tests/compare.py`` asserts and the benchmarks ask before they time anything."""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def rel_rms(x: Tensor, exact: Tensor) -> float:
    """Root mean square of ``x - exact`` over that of ``exact``, where ``exact`` is finite.

    A truth of zeros has no scale: the error is then absolute. NaN if ``x`` is NaN where the truth is a number.
    """
    finite = exact.isfinite()
    truth = exact[finite].double()
    error = torch.linalg.vector_norm(x[finite].double() - truth).item()
    scale = torch.linalg.vector_norm(truth).item()
    return error / (scale if scale > 0 else max(truth.numel(), 1) ** 0.5)


def worst_index(x: Tensor, exact: Tensor) -> str:
    """Where ``x`` is farthest from ``exact``, and the two values there."""
    if exact.numel() == 0:
        return "nowhere (empty)"
    distance = (x.double() - exact.double()).abs().nan_to_num(nan=-1.0)  # two equal infinities differ by NaN
    index = tuple(int(i) for i in torch.unravel_index(distance.argmax(), exact.shape))
    return f"{list(index)}: {x[index].item():.6g} instead of {exact[index].item():.6g}"


def mismatch(
    name: str, out: Tensor, exact: Tensor, plain: Tensor, *, dtype: torch.dtype, slack: float = 2
) -> str | None:
    """Why ``out`` is not close enough; None if it is.

    ``out`` may be twice as wrong as plain PyTorch at the same dtype is, and ``slack`` roundings more.

    Args:
        name: of the tensor, for the message.
        out: what is tested.
        exact: the reference in higher precision.
        plain: the same reference run at ``dtype``.
        dtype: the dtype it was computed in.
        slack: in unit roundoffs of ``dtype``.
    """
    if out.shape != exact.shape:
        return f"{name}: shape {tuple(out.shape)} != {tuple(exact.shape)}"
    if out.dtype != plain.dtype:
        return f"{name}: {out.dtype} != {plain.dtype}"
    if not torch.equal(out.isnan(), exact.isnan()):
        return f"{name}: NaN pattern differs"
    infinite = exact.isinf()
    if not torch.equal(out.isinf(), infinite):
        return f"{name}: Inf pattern differs"
    if not torch.equal(out[infinite] > 0, exact[infinite] > 0):
        return f"{name}: sign of Inf differs"
    bound = 2 * rel_rms(plain, exact) + slack * UNIT_ROUNDOFF[dtype]
    if not math.isfinite(bound):
        return f"{name}: the plain reference is not finite where the truth is; it bounds nothing"
    err = rel_rms(out, exact)
    if not err <= bound:  # a NaN error is no pass
        return f"{name}: rel-RMS {err:.2e} > {bound:.2e}; worst at {worst_index(out, exact)}"
    return None
