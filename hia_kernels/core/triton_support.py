"""Checks shared by all Triton backends: is Triton installed, and does it serve the device?"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import devices, triton_interpreter


def interpreted() -> bool:
    """Tell whether Triton's interpreter runs kernels on the CPU: ``TRITON_INTERPRET=1`` before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # half removed, or replaced by something that is no package
        return False


def unavailable_reasons() -> list[str]:
    """Return why no Triton kernel can run on this machine."""
    has_device = torch.cuda.is_available()
    reasons = [] if has_device or interpreted() else ["no CUDA device that torch can see"]
    if not _has_triton():
        install = ": pip install 'hia-kernels[triton]'" if has_device else ""  # no help where there is no device
        reasons.append(f"the package triton is not installed{install}")
    return reasons


def device_reasons(tensor: Tensor) -> list[str]:
    """Return why Triton can't serve the device of ``tensor``, or its dtype: first check of ``unsupported_reasons``."""
    found = [] if tensor.is_cpu and interpreted() else devices.not_cuda_reasons(tensor)
    if tensor.dtype == torch.float64:
        found.append("float64 is left to the reference")
    return found


def load(module: str) -> ModuleType:
    """Import a module of kernels, ready to run where they are to run: interpreted ones need a repair of Triton."""
    if interpreted():
        triton_interpreter.repair()
    return importlib.import_module(module)


def lazy(module: str, function: str) -> Callable[..., Any]:
    """Return a function that imports ``module`` when first called: importing hia_kernels must not need Triton.

    Triton launches on the current device, which need not be the tensors': it is theirs during the call.

    Args:
        module: dotted, absolute.
        function: its name there.
    """

    def call(*args: Any) -> Any:
        loaded = sys.modules.get(module) or load(module)  # the second takes a microsecond
        implementation = getattr(loaded, function)
        tensor = next(argument for argument in args if isinstance(argument, Tensor))
        if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
            return implementation(*args)
        with torch.cuda.device(tensor.device):
            return implementation(*args)

    call.__name__ = function
    return call
