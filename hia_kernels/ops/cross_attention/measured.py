"""The fastest backends of ``cross_attention`` on this device, by bucket of sizes: what ``auto`` takes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...core import backend, tuning
from ...core.backend import BACKWARD

OP = "cross_attention"
NOT_DETERMINISTIC = ("cudnn",)  # in their gradients
Reasons = Callable[..., list[str]]


def backend_key(
    function: str, q: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, max_seqlen_k: int, **rest: Any
) -> str:
    """Return what a measurement of backends holds for: the pass, sizes in powers of two, heads, head_dim and dtype."""
    sequences, longest_q, longest_k = map(tuning.bucket, (cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k))
    mode, dtype = "bwd" if function.endswith(BACKWARD) else "fwd", str(q.dtype).removeprefix("torch.")
    return f"{mode}-b{sequences}-q{longest_q}-k{longest_k}-h{q.shape[1]}-d{q.shape[2]}-{dtype}"


def slower_reasons(name: str) -> Reasons:
    """Make the ``slower_reasons`` of the row of that name."""

    def reasons(function: str, **arguments: Any) -> list[str]:
        if name in NOT_DETERMINISTIC and function.endswith(BACKWARD):
            return ["its gradients are not deterministic"]
        device = arguments["q"].device
        if not tuning.has_backends(OP, device):
            return []
        key = backend_key(function, **arguments)
        best = tuning.measured_backend(OP, key, device)
        row = None if best in (None, name) else backend.TABLES[OP].row(best)
        # a package that is gone, or lengths that it can't take, leave the call to the table's order
        if row is None or row.refusals(function, arguments, forced=True) or row.slower_reasons(function, **arguments):
            return []
        return [f"{best} was faster at {key}"]

    return reasons
