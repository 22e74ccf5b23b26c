"""The dispatcher: which implementation of an op runs, by one table per op, in order of preference.

torch picks the device; within a device the first backend of the op's table that can run is taken. ``HIA_BACKEND`` (or
:func:`use_backend`) forces one for every op that has a row of that name. A forced row that can't run a call raises with
every reason; an op without such a row runs ``auto``. :func:`last_backend` tells what served.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from . import once, settings

once.refuse_reload(globals())

AUTO = "auto"
REFERENCE = "reference"
BACKWARD = "_bwd"  # how the names of the functions that take gradients back end


def _never(*_args: Any, **_arguments: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: a row of its table.

    Reasons are asked for with the function's name and the arguments of the call by the names of its schema, defaults
    included.

    Attributes:
        name: of the row, e.g. "triton".
        functions: for every function of the op, by its name in ``torch.ops.hia``, the Python function behind it.
            A row may also have functions that are not registered: what the table is asked beside calls, as the
            layout that weights should have.
        unsupported_reasons: ``(function, **arguments)`` -> why these inputs can't run here; empty if they can.
        unavailable_reasons: why this machine can't run it at all (a missing package, no such device).
        slower_reasons: ``(function, **arguments)`` -> why a later row is faster for these inputs, which this one could
            serve; asked for ``auto`` alone, so forcing the backend runs it all the same.
        forced_functions: those that run in place of ``functions`` where the backend is forced: a row that takes the
            large parts of a call alone takes all of them then.
    """

    name: str
    functions: Mapping[str, Callable[..., Any]]
    unsupported_reasons: Callable[..., list[str]] = _never
    unavailable_reasons: Callable[[], list[str]] = _never
    slower_reasons: Callable[..., list[str]] = _never
    forced_functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def refusals(self, function: str, arguments: Mapping[str, Any], *, forced: bool) -> list[str]:
        """List why the row doesn't serve a call; empty if it does."""
        if function not in self.functions:
            return [f"has no {function}"]
        if forced:
            return self.unavailable_reasons() or self.unsupported_reasons(function, **arguments)
        # what the call's tensors tell first: it is cheap to ask for, and rejects most rows
        return (
            self.unsupported_reasons(function, **arguments)
            or self.slower_reasons(function, **arguments)
            or self.unavailable_reasons()
        )


Rejected = list[tuple[Backend, list[str]]]  # rows that don't serve a call, with their reasons


@dataclass
class BackendTable:
    """The backends of one op, fastest first; ``reference`` is last and always can run."""

    op: str
    backends: list[Backend] = field(default_factory=list)

    def row(self, name: str) -> Backend | None:
        """Return the row of that name, if there is one."""
        return next((backend for backend in self.backends if backend.name == name), None)

    def forced(self, function: str) -> str | None:
        """Return the name of the row that is forced on a function; None where ``auto`` chooses.

        Forcing leaves an op without such a row to ``auto``, and a gradient that the row does not compute.
        """
        wanted = requested_backend()
        row = None if wanted == AUTO else self.row(wanted)
        if row is None or (function.endswith(BACKWARD) and function not in row.functions):
            return None
        return wanted

    def find(self, function: str, arguments: Mapping[str, Any]) -> tuple[Backend | None, list[str]]:
        """Find the row that serves a call now, without calling it.

        Args:
            function: of the op, in some row's ``functions``.
            arguments: of the call, by name.

        Returns:
            The row and why no earlier one serves, or None and why none does.

        Raises:
            ValueError: ``HIA_BACKEND`` or ``HIA_CPU_ISA`` is none of its choices.
        """
        row, rejected = self._find(function, arguments, self.forced(function))
        return row, _listed(rejected)

    def _find(self, function: str, arguments: Mapping[str, Any], forced: str | None) -> tuple[Backend | None, Rejected]:
        settings.read("HIA_CPU_ISA")  # a misspelt one is an error for every op, like a misspelt backend
        rejected: Rejected = []
        for backend in self.backends:
            if forced is not None and backend.name != forced:
                continue
            if forced is None and function not in backend.functions:
                continue  # which says nothing of the call
            reasons = backend.refusals(function, arguments, forced=forced is not None)
            if not reasons:
                return backend, rejected
            rejected.append((backend, reasons))  # every call: it is made text where someone reads it
        return None, rejected

    def select(self, function: str, arguments: Mapping[str, Any]) -> Callable[..., Any]:
        """Return the implementation of ``function`` for these arguments, and note who serves.

        Raises:
            ValueError: ``HIA_BACKEND`` or ``HIA_CPU_ISA`` is none of its choices.
            NotImplementedError: the forced backend can't run; lists every reason.
        """
        forced = self.forced(function)
        backend, rejected = self._find(function, arguments, forced)
        if backend is None:
            reasons = "; ".join(_listed(rejected))
            raise NotImplementedError(f"hia::{self.op}: HIA_BACKEND={forced or AUTO} can't run this call: {reasons}")
        _note(self.op, backend.name)
        functions = backend.functions if forced is None else backend.forced_functions or backend.functions
        return functions[function]


def _listed(rejected: Rejected) -> list[str]:
    return [f"{row.name}: {reason}" for row, reasons in rejected for reason in reasons]


TABLES: dict[str, BackendTable] = {}


def register_table(op: str, *backends: Backend) -> BackendTable:
    """Make the op's table known to dispatch and to ``python -m hia_kernels.info``."""
    table = BackendTable(op, list(backends))
    TABLES[op] = table
    return table


def backend_names() -> tuple[str, ...]:
    """List what may be forced: ``auto``, and every name that some op's table has a row of."""
    return (AUTO, *sorted({row.name for table in TABLES.values() for row in table.backends}))


@dataclass(eq=False)
class _Block:
    """One ``use_backend`` block that has been entered; told from others by its identity."""

    name: str
    ended: bool = False  # set by another thread or task, which can't take it out of the context that it began in


# Values are never changed in place: a task that copies its parent's context must not see what happens there later.
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("hia_backend_blocks", default=())
_entered: ContextVar[None] = ContextVar("hia_backend_entered")  # its tokens tell the context that a block began in
# By op, a list of one name: a backward pass writes into its caller's, see _note.
_served: ContextVar[Mapping[str, list[str]]] = ContextVar("hia_backend_served", default=MappingProxyType({}))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _caller_of_backward(variable: ContextVar[Any]) -> Any:
    """Return a variable's value where ``backward()`` was called; None if that can't be told.

    Autograd runs the gradients of CUDA tensors on threads of its own, and those of compiled functions in a copy of the
    caller's context, which PyTorch keeps for them.
    """
    if not _in_backward() or not torch._C._is_key_in_tls("context"):
        return None
    return torch._C._get_obj_in_tls("context").get(variable)


def _not_ended(blocks: tuple[_Block, ...] | None) -> tuple[_Block, ...]:
    return tuple(block for block in blocks if not block.ended) if blocks else ()


def _forcing_blocks() -> tuple[_Block, ...]:
    return _not_ended(_blocks.get()) or _not_ended(_caller_of_backward(_blocks))


def _note(op: str, name: str) -> None:
    """Keep who served ``op``, for :func:`last_backend`."""
    if _in_backward():
        cell = (_caller_of_backward(_served) or _served.get()).get(op)
        if cell is not None:
            cell[0] = name
            return
    _served.set({**_served.get(), op: [name]})


def block_backend() -> str | None:
    """Return what the innermost :func:`use_backend` block forces; None outside of any."""
    blocks = _forcing_blocks()
    return blocks[-1].name if blocks else None


def requested_backend() -> str:
    """Return the forced backend's name, or ``auto``.

    Raises:
        ValueError: ``HIA_BACKEND`` is none of its choices.
    """
    name = block_backend()
    if name is not None:
        return name
    return settings.read("HIA_BACKEND", backend_names()) if os.environ.get("HIA_BACKEND") else AUTO


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block; stronger than ``HIA_BACKEND``.

    It holds for this thread or task (``contextvars``), for tasks and ``asyncio.to_thread`` begun inside, to their end,
    and for the gradients of what is computed inside, unless ``backward`` is called in another block. Blocks may end in
    any order: each takes away itself alone. A generator shares its caller's context, so a block that it is suspended
    in holds for the caller too, until the generator goes on or is closed.

    Args:
        name: of a backend, in any case; "auto" or "" forces none. Ops without a row of that name run ``auto``.

    Raises:
        ValueError: no op has a backend of that name.
    """
    chosen = (settings.normalised(name) or AUTO) if isinstance(name, str) else ""
    if chosen not in backend_names():
        raise ValueError(f"use_backend: name must be one of {', '.join(backend_names())}, got {name!r}")
    block = _Block(chosen)
    _blocks.set((*_not_ended(_blocks.get()), block))
    entered = _entered.set(None)
    try:
        yield
    finally:
        try:
            _entered.reset(entered)
        except ValueError:  # it began in another context: a generator that a thread or the event loop closes
            block.ended = True
        _blocks.set(tuple(one for one in _not_ended(_blocks.get()) if one is not block))


def last_backend(op: str) -> str | None:
    """Return the backend that served the op's latest call in this thread or task; None before the first.

    A backward pass counts where ``backward`` was called, whatever thread it ran on. For tests and debugging.

    Raises:
        ValueError: no such op.
    """
    if op not in TABLES:
        raise ValueError(f"last_backend: op must be one of {', '.join(sorted(TABLES))}, got {op!r}")
    cell = _served.get().get(op)
    return None if cell is None else cell[0]


def reference_implementation(overload: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """Return the plain PyTorch function behind a ``torch.ops.hia`` overload, or None for any other op.

    Lets a tracer (fake tensors, memory tracking) see what the unfused implementation allocates.
    """
    namespace, _, function = overload._schema.name.partition("::")
    if namespace != "hia":
        return None
    for table in TABLES.values():
        row = table.row(REFERENCE)
        if row is not None and function in row.functions:
            return row.functions[function]
    return None


def debug_enabled() -> bool:
    """Return whether values are checked even where that makes the host wait for the device: ``HIA_DEBUG=1``."""
    return settings.read("HIA_DEBUG") == "1"
