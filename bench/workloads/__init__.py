"""The only list of what is measured: one module an op with one entry, and the adapter's composites.

Inputs, FLOPs and bytes of an op come from its own ``hia_kernels/ops/<op>/inputs.py``. The op's tests, the benchmarks,
the regression set, tuning and the compile tier read these two and nothing else. A module here that has an ``ENTRY`` is
found by itself; :func:`register` adds an entry from elsewhere.
"""

from __future__ import annotations

import importlib
import pkgutil

from . import adapter as _adapter
from .cases import CASES, FIRST, RESOLUTIONS, ImageCase, LayerCase, Size, halved
from .registry import (
    CompositeEntry,
    Edge,
    Inputs,
    OpEntry,
    ShapeCase,
    Workload,
    composite_entry,
    composites,
    entry,
    gpu_workloads,
    in_set,
    make_inputs,
    op_entry,
    ops,
    references,
    register,
    unregister,
    workloads,
)

__all__ = [
    "CASES",
    "FIRST",
    "RESOLUTIONS",
    "CompositeEntry",
    "Edge",
    "ImageCase",
    "Inputs",
    "LayerCase",
    "OpEntry",
    "ShapeCase",
    "Size",
    "Workload",
    "composite_entry",
    "composites",
    "entry",
    "gpu_workloads",
    "halved",
    "in_set",
    "make_inputs",
    "op_entry",
    "ops",
    "references",
    "register",
    "unregister",
    "workloads",
]

for _module in pkgutil.iter_modules(__path__):
    _found = getattr(importlib.import_module(f"{__name__}.{_module.name}"), "ENTRY", None)
    if _found is not None:
        register(_found)
for _entry in _adapter.COMPOSITES:
    register(_entry)
