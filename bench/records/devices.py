"""The devices and dtypes that are measured, by the names that options and records have for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

AUTO = "auto"
DEVICES = ("cpu", "cuda")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEFAULT_DTYPE = {"cpu": "fp32", "cuda": "bf16"}


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of one of :data:`DTYPES`."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[name])
    return found


def cuda_is_available() -> bool:
    """Tell whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()
