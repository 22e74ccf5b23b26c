"""Uninitialised memory that holds NaN, so that a result left unwritten shows."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = "hia_kernels"


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] != LIBRARY:
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(1) if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

    return wrapper


with torch.device("cpu"):  # torch remembers what its constructors are the first time: not the poisoned ones
    torch.empty(0, dtype=torch.float32)


def poison_uninitialised(replace: Callable[[Any, str, Any], None]) -> None:
    """Fill what the library allocates and doesn't write; ``replace`` is a ``setattr``."""
    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (Tensor, ("new_empty",))):
        for name in names:
            replace(owner, name, _poisoned(getattr(owner, name)))
