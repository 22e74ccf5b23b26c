"""The cases that launch every Triton kernel, and the list of the kernels."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hia_kernels import ops as all_ops

from ..launches.workloads import rows_of
from ..records.targets import importance
from ..workloads import gpu_workloads, op_entry

# beside an op's small shape and its first real one: workloads and edges whose launches those two don't have
FURTHER = {
    "cross_attention": ("13b-896-2img:extract", "4 heads of 128, 16384 keys"),  # fused heads; split keys
    "row_softmax": ("32768 tokens",),  # rows that no block holds
    "stem": ("grey, float pixels",),  # which have a gradient
}
SMALL = "small"


@dataclass(frozen=True)
class Case:
    """One op at one shape by one row of its table.

    Attributes:
        op: its name.
        name: of the shape.
        dtype: of the inputs, a key of :data:`bench.records.devices.DTYPES`.
        row: of the op's table.
    """

    op: str
    name: str
    dtype: str
    row: str

    @property
    def label(self) -> str:
        """Name the case in the output."""
        return f"{self.op} {self.name} {self.dtype} {self.row}"

    @property
    def shape(self) -> Any:
        """Return the op's ``Shape``."""
        return _shapes(self.op)[self.name][0]


def _shapes(op: str) -> dict[str, tuple[Any, str]]:
    """Return shapes and dtypes by name: the small one, the most important real one, and what reaches the rest."""
    entry = op_entry(op)
    real = sorted((one for one in gpu_workloads() if one.op == op), key=importance)
    known = {one.name: (one.shape, "bf16") for one in real} | {one.name: (one.shape, one.dtype) for one in entry.edges}
    names = (real[0].name, *FURTHER.get(op, ()))
    return {SMALL: (entry.inputs.SMALL, "fp32"), **{name: known[name] for name in names}}


def cases(device: str, ops: Iterable[str]) -> list[Case]:
    """List the cases: of a GPU all, the small ones first; of a CPU, whose interpreter takes its time, those alone."""
    found = [
        Case(op, name, dtype, row)
        for op in ops
        for name, (_, dtype) in _shapes(op).items()
        for row in rows_of(op)
        if device == "cuda" or name == SMALL
    ]
    return sorted(found, key=lambda case: case.name != SMALL)


def kernels(ops: Iterable[str]) -> dict[str, str]:
    """List the Triton kernels of some ops by name, with the op that each belongs to."""
    found = {}
    for op in ops:
        package = importlib.import_module(f"{all_ops.__name__}.{op}")
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.startswith("triton_"):
                names = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
                found.update({name: op for name, value in names.items() if _is_kernel(name, value, op)})
    return found


def _is_kernel(name: str, value: Any, op: str) -> bool:
    return name.startswith(f"_{op}_") and name.endswith("_kernel") and hasattr(value, "fn")


@contextmanager
def launched() -> Iterator[set[str]]:
    """Collect the names of the kernels that are launched inside the block."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    found: set[str] = set()
    before = [(kind, kind.run) for kind in (JITFunction, InterpretedFunction)]

    def noting(run: Any) -> Any:
        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            found.add(self.fn.__name__)
            return run(self, *args, **kwargs)

        return noted

    try:
        for kind, run in before:
            kind.run = noting(run)
        yield found
    finally:
        for kind, run in before:
            kind.run = run
