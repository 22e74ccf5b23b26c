"""Reference of ``row_dot`` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def row_dot_ref(x: Tensor, y: Tensor) -> Tensor:
    """Compute [R, C] and [R, C] -> [R]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * y.to(wide)).sum(1).to(x.dtype)
