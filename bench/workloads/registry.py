"""The register of what can be measured: entries of ops and composites, and their workloads."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

import hia_kernels
from hia_kernels.core.draw import Draw

Inputs = dict[str, Any]


class Case(Protocol):
    """Sizes with a name: :class:`~bench.workloads.cases.ImageCase`, ``LayerCase``, or :class:`ShapeCase`."""

    @property
    def name(self) -> str:
        """Name the case, as ``--case`` takes it."""

    @property
    def sets(self) -> tuple[str, ...]:
        """List those it is in; see :func:`in_set`."""


@dataclass(frozen=True)
class ShapeCase:
    """A shape of one op, which belongs to no layer of ours.

    Attributes:
        name: of the case.
        shape: the op's ``Shape``.
        sets: "cpu", "gpu", "quick" and "dispatch", as of the other cases.
    """

    name: str
    shape: Any
    sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Edge:
    """A shape that the kernels are made for and no workload has: the compile tier records the launches it causes.

    Attributes:
        name: of the edge.
        shape: the op's ``Shape``.
        dtype: "bf16", "fp16" or "fp32".
        differentiable: arguments whose gradients are recorded too; None takes all that the op has.
        function: what is called; None takes the op's public function. An op itself takes the mixed dtypes that the
            public function allows only inside autocast.
    """

    name: str
    shape: Any
    dtype: str = "bf16"
    differentiable: tuple[str, ...] | None = None
    function: Callable[..., Any] | None = None


def _own_shape(case: Any, _role: str) -> Any:
    return case.shape


def in_named_set(case: Case, _role: str, name: str) -> bool:
    """Tell whether the case itself says that it is in a set."""
    return name in case.sets


@dataclass(frozen=True, kw_only=True)
class OpEntry:
    """An op: its real shapes, and what it is compared with.

    Attributes:
        name: of the op, the same everywhere.
        inputs: its module ``inputs``: Shape, make_inputs, flops, moved_bytes, DIFFERENTIABLE, PARAMETERS.
        reference: plain PyTorch with the public function's signature.
        cases: where it occurs.
        regression: the shape that the small CPU set times.
        roles: where in a case, for an op that occurs in several shapes.
        shape: the ``Shape`` in a case and role.
        in_set: whether a case and role belong to a set.
        edges: what the compile tier records beside the "gpu" set.
        trained: arguments whose gradients the small CPU set times too; none leaves the backward out.
        function: the public function; None takes ``hia_kernels.<name>``.
        compilable: the reference in a form that ``torch.compile`` takes; None takes the reference.
    """

    name: str
    inputs: Any
    reference: Callable[..., Any]
    cases: tuple[Case, ...]
    regression: Hashable
    roles: tuple[str, ...] = ("",)
    shape: Callable[[Any, str], Any] = _own_shape
    in_set: Callable[[Any, str, str], bool] = in_named_set
    edges: tuple[Edge, ...] = ()
    trained: tuple[str, ...] = ()
    function: Callable[..., Any] | None = None
    compilable: Callable[..., Any] | None = None

    @property
    def public(self) -> Callable[..., Any]:
        """Return the function as users call it, looked up anew each time: a provider may have replaced it."""
        return self.function or getattr(hia_kernels, self.name)

    @property
    def compilable_reference(self) -> Callable[..., Any]:
        """Return the reference in the form that ``torch.compile`` takes."""
        return self.compilable or self.reference


@dataclass(frozen=True, kw_only=True)
class CompositeEntry:
    """Several steps of the adapter, as :mod:`bench.providers.layers` runs them.

    Attributes:
        name: of the composite.
        cases: where it occurs.
        draw_inputs: its arguments in a case, by name.
        parts: the parts of a decoder layer that it has: "extract", "inject".
        encodes: whether it runs the encoder.
        trains: whether it is a training step.
        in_set: whether a case belongs to a set; its role is "".
    """

    name: str
    cases: tuple[Case, ...]
    draw_inputs: Callable[[Any, Draw], Inputs]
    parts: tuple[str, ...] = ()
    encodes: bool = False
    trains: bool = False
    in_set: Callable[[Any, str, str], bool] = in_named_set

    roles = ("",)


Entry = OpEntry | CompositeEntry
_entries: dict[str, Entry] = {}


def register(entry: Entry) -> None:
    """Make an op or composite known to tests, benchmarks, the regression set, tuning and the compile tier.

    Raises:
        ValueError: its name is taken.
    """
    if entry.name in _entries:
        raise ValueError(f"bench.workloads: name must be new, got {entry.name!r}, which is registered")
    _entries[entry.name] = entry


def unregister(name: str) -> None:
    """Forget an op or composite.

    Raises:
        ValueError: there is none of that name.
    """
    entry(name)
    del _entries[name]


def entry(name: str) -> Entry:
    """Return the entry of an op or composite.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in _entries:
        raise ValueError(f"bench.workloads: op must be among {', '.join(_entries)}, got {name!r}")
    return _entries[name]


def op_entry(name: str) -> OpEntry:
    """Return the entry of an op.

    Raises:
        ValueError: there is none of that name.
    """
    found = entry(name)
    if not isinstance(found, OpEntry):
        raise ValueError(f"bench.workloads: op must be among {', '.join(ops())}, got the composite {name!r}")
    return found


def composite_entry(name: str) -> CompositeEntry:
    """Return the entry of a composite.

    Raises:
        ValueError: there is none of that name.
    """
    found = entry(name)
    if not isinstance(found, CompositeEntry):
        raise ValueError(f"bench.workloads: composite must be among {', '.join(composites())}, got the op {name!r}")
    return found


def ops() -> tuple[str, ...]:
    """List the ops."""
    return tuple(name for name, found in _entries.items() if isinstance(found, OpEntry))


def composites() -> tuple[str, ...]:
    """List the composites."""
    return tuple(name for name, found in _entries.items() if isinstance(found, CompositeEntry))


def references(*, compilable: bool = False) -> dict[str, Callable[..., Any]]:
    """Return the plain PyTorch of every op of ``hia_kernels``, by name.

    Args:
        compilable: in the forms that ``torch.compile`` takes.
    """
    found = {name: op_entry(name) for name in ops()}
    ours = {name: one for name, one in found.items() if one.function is None}
    return {name: one.compilable_reference if compilable else one.reference for name, one in ours.items()}


@dataclass(frozen=True)
class Workload:
    """An op or composite at a case: one thing to measure.

    Attributes:
        op: of :func:`ops` or :func:`composites`.
        case: its sizes.
        role: where in the layer, for an op that occurs in several shapes; else "".
    """

    op: str
    case: Any
    role: str = ""

    @property
    def entry(self) -> Entry:
        """Return the entry of the op or composite."""
        return entry(self.op)

    @property
    def level(self) -> str:
        """Return "op" or "composite"."""
        return "op" if isinstance(self.entry, OpEntry) else "composite"

    @property
    def name(self) -> str:
        """Name the case, and the role behind a colon."""
        return f"{self.case.name}:{self.role}" if self.role else self.case.name

    @property
    def shape(self) -> Any:
        """Return the op's ``Shape``."""
        return op_entry(self.op).shape(self.case, self.role)


def workloads(name: str) -> list[Workload]:
    """List every case of an op or composite, each role a workload of its own.

    Raises:
        ValueError: no such op or composite.
    """
    found = entry(name)
    return [Workload(name, case, role) for case in found.cases for role in found.roles]


def in_set(workload: Workload, name: str) -> bool:
    """Tell whether a workload belongs to a set: "cpu" or "gpu", what a run without ``--case`` measures there; "quick",
    a smoke test; "dispatch", so small that it shows what a call costs before it computes."""
    return workload.entry.in_set(workload.case, workload.role, name)


def gpu_workloads() -> list[Workload]:
    """List what the compile tier compiles for: the "gpu" set of every op."""
    return [workload for op in ops() for workload in workloads(op) if in_set(workload, "gpu")]


def make_inputs(workload: Workload, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draw the arguments of an op, by name; of a composite, what :mod:`bench.providers.layers` says it takes.

    Args:
        workload: op or composite, and case.
        dtype: of floating tensors; scales and shifts are fp32 beside halves.
        device: "cpu" or "cuda".
        seed: another one gives other numbers.
    """
    found = workload.entry
    if isinstance(found, OpEntry):
        return found.inputs.make_inputs(workload.shape, dtype, device, seed)
    return found.draw_inputs(workload.case, Draw(dtype, device, seed))
