"""Short calls of the ops' own input makers.

Tests choose their shapes by what can go wrong, most of them small and odd; the real ones that the benchmarks measure
are in ``bench/workloads/``. Both are drawn by ``hia_kernels/ops/<op>/inputs.py``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch

from hia_kernels import ops

Inputs = dict[str, Any]

OPS = tuple(module.name for module in pkgutil.iter_modules(ops.__path__))


def module_of(op: str) -> Any:
    """Import the op's ``inputs.py``."""
    return importlib.import_module(f"hia_kernels.ops.{op}.inputs")


def differentiable(op: str) -> tuple[str, ...]:
    """List the arguments that an op has gradients of; of the stem's pixels only floating ones."""
    return module_of(op).DIFFERENTIABLE


def inputs_of(op: str) -> Callable[..., Inputs]:
    """Return ``make(*sizes, dtype, device="cpu", **options)``: strided inputs at ``Shape(*sizes, **options)``."""
    module = module_of(op)

    def make(*arguments: Any, **options: Any) -> Inputs:
        at = next(position for position, value in enumerate(arguments) if isinstance(value, torch.dtype))
        sizes = (tuple(size) if isinstance(size, list) else size for size in arguments[:at])
        return module.make_inputs(module.Shape(*sizes, **options), *arguments[at:], strided=True)

    return make


def small_inputs(op: str, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Draw strided inputs at the shape that a quick check runs."""
    module = module_of(op)
    return module.make_inputs(module.SMALL, dtype, device, strided=True)
