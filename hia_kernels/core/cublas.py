"""Reasons of the rows whose products are plain cuBLAS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import devices


def unavailable_reasons() -> list[str]:
    """Return why there is no cuBLAS on this machine."""
    return [] if torch.cuda.is_available() else ["no CUDA device that torch can see"]


def unsupported_reasons(function: str, x: Tensor, **rest: Any) -> list[str]:
    """Return why it can't serve a call whose tensors are where ``x`` is."""
    return devices.not_cuda_reasons(x)
