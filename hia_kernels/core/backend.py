"""Which implementation of an op runs: one table per op, in order of preference.

torch picks the device; within a device the first backend of the op's table that can run is taken.
``HIA_BACKEND`` (or :func:`use_backend`) forces one; a forced backend that can't run raises with every
reason, and nothing falls back in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from . import settings
from .settings import BACKEND_NAMES

_forced: list[str] = []  # a stack: use_backend nests
_last: dict[str, str] = {}


def _never(*_args: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: one of :data:`BACKEND_NAMES`.
        functions: for every ``torch.ops.hia`` function of the op, by its name, the Python function behind it.
        unsupported_reasons: why these inputs can't run here; empty if they can. Called with the op's arguments.
        unavailable_reasons: why this machine can't run it at all (a missing package, no such device).
        slower_reasons: why a later row is faster for these inputs, which this one could serve; asked for ``auto``
            alone, so forcing the backend runs it all the same. Called with the op's arguments.
    """

    name: str
    functions: dict[str, Callable[..., Any]]
    unsupported_reasons: Callable[..., list[str]] = _never
    unavailable_reasons: Callable[[], list[str]] = _never
    slower_reasons: Callable[..., list[str]] = _never


@dataclass
class BackendTable:
    """The backends of one op, fastest first; ``reference`` is last and always can run."""

    op: str
    backends: list[Backend] = field(default_factory=list)

    def select(self, function: str, *args: Any) -> Callable[..., Any]:
        """The implementation of ``function`` for these arguments.

        Raises:
            ValueError: ``HIA_BACKEND`` or ``HIA_CPU_ISA`` is none of its choices.
            NotImplementedError: the forced backend can't run; lists every reason.
        """
        wanted = requested_backend()
        settings.read("HIA_CPU_ISA")  # a misspelt one is an error for every op, like a misspelt backend
        rejected: list[str] = []
        for backend in self.backends:
            if wanted not in ("auto", backend.name):
                continue
            reasons = self._reasons(backend, function, *args)
            if not reasons and wanted == "auto":
                reasons = backend.slower_reasons(*args)
            if not reasons:
                _last[self.op] = backend.name
                return backend.functions[function]
            rejected += [f"{backend.name}: {reason}" for reason in reasons]
        if not rejected:
            rejected = [f"{wanted}: {missing_reason(self, wanted)}"]
        raise NotImplementedError(f"hia::{self.op}: HIA_BACKEND={wanted} can't run this call: " + "; ".join(rejected))

    @staticmethod
    def _reasons(backend: Backend, function: str, *args: Any) -> list[str]:
        if function not in backend.functions:
            return [f"has no {function}"]
        return backend.unavailable_reasons() or backend.unsupported_reasons(*args)


TABLES: dict[str, BackendTable] = {}


def register_table(op: str, *backends: Backend) -> BackendTable:
    """Make the op's table known to dispatch and to ``python -m hia_kernels.info``."""
    table = BackendTable(op, list(backends))
    TABLES[op] = table
    return table


def missing_reason(table: BackendTable, name: str) -> str:
    """Why ``name`` has no row in the table."""
    listed = ", ".join(backend.name for backend in table.backends)
    return f"no implementation of {table.op} in this version (there is: {listed})"


def requested_backend() -> str:
    """The forced backend's name, or ``auto``."""
    return _forced[-1] if _forced else settings.read("HIA_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block; stronger than ``HIA_BACKEND``.

    Raises:
        ValueError: no backend has that name.
    """
    if name not in BACKEND_NAMES:
        raise ValueError(f"use_backend: name must be one of {', '.join(BACKEND_NAMES)}, got {name!r}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def last_backend(op: str) -> str | None:
    """The backend that served the op's latest call in this process; None before the first. For tests and debugging.

    Raises:
        ValueError: no such op.
    """
    if op not in TABLES:
        raise ValueError(f"last_backend: op must be one of {', '.join(sorted(TABLES))}, got {op!r}")
    return _last.get(op)


def reference_implementation(overload: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """The plain PyTorch function behind a ``torch.ops.hia`` overload, or None for any other op.

    Lets a tracer (fake tensors, memory tracking) see what the unfused implementation allocates.
    """
    namespace, _, function = overload._schema.name.partition("::")
    if namespace != "hia":
        return None
    for table in TABLES.values():
        for backend in table.backends:
            if backend.name == "reference" and function in backend.functions:
                return backend.functions[function]
    return None


def debug_enabled() -> bool:
    """``HIA_DEBUG=1``: check values too, even where that makes the host wait for the device."""
    return settings.read("HIA_DEBUG") == "1"
