"""The only tolerance policy of the repository."""

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


def assert_close(name: str, out: Tensor, exact: Tensor, plain: Tensor, *, dtype: torch.dtype, slack: float = 2) -> None:
    """``out`` may be twice as wrong as plain PyTorch at the same dtype is, and ``slack`` roundings more.

    Args:
        name: of the tensor, for the message.
        out: what is tested.
        exact: the reference in higher precision.
        plain: the same reference run at ``dtype``.
        dtype: the dtype it was computed in.
        slack: in unit roundoffs of ``dtype``.
    """
    assert out.shape == exact.shape, f"{name}: shape {tuple(out.shape)} != {tuple(exact.shape)}"
    assert out.dtype == plain.dtype, f"{name}: {out.dtype} != {plain.dtype}"
    assert torch.equal(out.isnan(), exact.isnan()), f"{name}: NaN pattern differs"
    infinite = exact.isinf()
    assert torch.equal(out.isinf(), infinite), f"{name}: Inf pattern differs"
    assert torch.equal(out[infinite] > 0, exact[infinite] > 0), f"{name}: sign of Inf differs"
    bound = 2 * rel_rms(plain, exact) + slack * UNIT_ROUNDOFF[dtype]
    assert math.isfinite(bound), f"{name}: the plain reference is not finite where the truth is; it bounds nothing"
    err = rel_rms(out, exact)
    assert err <= bound, f"{name}: rel-RMS {err:.2e} > {bound:.2e}; worst at {worst_index(out, exact)}"
