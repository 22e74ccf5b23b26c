"""Reasons of the rows that serve one kind of device.

The texts are kept: most calls ask a row of another device first, and need no text at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

_texts: dict[tuple[str, torch.device], str] = {}  # no functools.cache: Dynamo warns of it


def _elsewhere(place: str, device: torch.device) -> str:
    text = _texts.get((place, device))
    if text is None:
        text = _texts[place, device] = f"tensors must be on {place}, got {device}"
    return text


def not_cuda_reasons(tensor: Tensor) -> list[str]:
    """Return why a row that needs a CUDA device can't serve a call with ``tensor``."""
    return [] if tensor.is_cuda else [_elsewhere("a CUDA device", tensor.device)]


def not_cpu_reasons(tensor: Tensor) -> list[str]:
    """Return why a row that needs the CPU can't serve a call with ``tensor``."""
    return [] if tensor.is_cpu else [_elsewhere("the CPU", tensor.device)]
