"""PyTorch's deterministic mode for the time of a call: some kernels are asked for one order of sums in no other way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def strict() -> Iterator[None]:
    """Make kernels inside take deterministic algorithms, and fill no memory for it; what held before comes back."""
    # not through torch.use_deterministic_algorithms, which also turns the mode on for compiled code
    enabled = torch._C._get_deterministic_algorithms()
    warn_only = torch._C._get_deterministic_algorithms_warn_only()
    fills = torch._C._get_deterministic_fill_uninitialized_memory()
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_fill_uninitialized_memory(fills)
        torch._C._set_deterministic_algorithms(enabled, warn_only=warn_only)
