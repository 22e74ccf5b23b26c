"""The plan of ``python -m bench ops``: the workloads that are asked for, in which modes, by whom, in which order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..cli import BadOption, device_of, one_of, some_of
from ..providers.registry import Provider, all_providers
from ..records.devices import DEFAULT_DTYPE, DTYPES
from ..records.record import MODES
from ..records.targets import TARGETS
from ..workloads import CASES, FIRST, CompositeEntry, Workload, composites, in_set, ops, workloads

SETS = ("cpu", "gpu", "quick", "targets")
Step = tuple[Workload, tuple[str, ...]]  # and its modes


@dataclass(frozen=True)
class Task:
    """A step of a run.

    Attributes:
        workload: op and case.
        modes: in which it is measured.
        dtype: its name.
        providers: names of who is.
    """

    workload: Workload
    modes: tuple[str, ...]
    dtype: str
    providers: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name the task in the progress."""
        return f"{self.workload.op} {self.workload.name} {self.dtype}"

    def without(self, provider: str) -> Task | None:
        """Return the task without a provider that failed; None where nobody is left, or it was none of them."""
        rest = tuple(name for name in self.providers if name != provider)
        return replace(self, providers=rest) if rest and len(rest) < len(self.providers) else None


@dataclass(frozen=True)
class Request:
    """A request as it is typed; nothing means the default."""

    op: Sequence[str] = ()
    case: Sequence[str] = ()
    set: str | None = None
    provider: Sequence[str] = ()
    mode: Sequence[str] = ()
    dtype: Sequence[str] = ()
    device: str = "auto"
    quick: bool = False


@dataclass(frozen=True)
class Plan:
    """The workloads that will be measured, and by whom.

    Attributes:
        device: "cpu" or "cuda".
        dtypes: names.
        providers: who is asked, in order.
        steps: workloads with their modes, the most telling first.
        filtered: something was asked for by name, so this is not all that the device can be asked.
        quick: a smoke test.
    """

    device: str
    dtypes: tuple[str, ...]
    providers: tuple[Provider, ...]
    steps: tuple[Step, ...] = field(default=())
    filtered: bool = False
    quick: bool = False

    def tasks(self) -> list[Task]:
        """List the tasks in order.

        On CUDA, where nothing was asked for by name, compiling comes last and for the first shapes only: max-autotune
        takes as long as everything else together. The other shapes get a row that says so.
        """
        everyone = tuple(provider.name for provider in self.providers)
        if self.filtered or self.device == "cpu":
            return [Task(*step, dtype, everyone) for dtype in self.dtypes for step in self.steps]
        plain = tuple(provider.name for provider in self.providers if not provider.compiles)
        compiled = tuple(provider.name for provider in self.providers if provider.compiles)
        first = [step for step in self.steps if not too_slow_to_compile("cuda", step[0])]
        tasks = [
            Task(*step, dtype, plain if step in first else everyone) for dtype in self.dtypes for step in self.steps
        ]
        return tasks + [Task(*step, dtype, compiled) for dtype in self.dtypes for step in first]


def make_plan(request: Request, *, listing: bool = False) -> Plan:
    """Check what is asked for.

    Raises:
        BadOption: an unknown name, ops that don't occur in the chosen cases, or modes that don't.
    """
    device = device_of(request.device, listing=listing)
    dtypes = some_of("--dtype", request.dtype or [DEFAULT_DTYPE[device]], DTYPES)
    modes = some_of("--mode", request.mode or MODES, MODES)
    known = all_providers()
    chosen = [known[name] for name in some_of("--provider", request.provider or ["*"], known)]
    if request.quick:
        chosen = [provider for provider in chosen if not provider.compiles]
    named = (request.op, request.case, request.provider, request.mode, request.dtype, request.set)
    filtered = request.quick or any(named)
    return Plan(device, dtypes, tuple(chosen), _steps(request, device, modes), filtered, request.quick)


def _steps(request: Request, device: str, modes: tuple[str, ...]) -> tuple[Step, ...]:
    """List the workloads of the chosen ops and cases, the most telling first, each with its modes."""
    groups = {"ops": ops(), "composites": composites()}
    given = [name for value in request.op or ["ops", "composites"] for name in groups.get(value, (value,))]
    chosen_ops = some_of("--op", given, ops() + composites())
    found = [workload for op in chosen_ops for workload in workloads(op)]
    if request.case:
        known = tuple(dict.fromkeys((*CASES, *(workload.name for workload in found))))
        wanted = set(some_of("--case", ["*" if value == "all" else value for value in request.case], known))
        chosen = [workload for workload in found if wanted & {workload.name, workload.case.name}]
        if not chosen:
            wrong = ", ".join(request.case)
            raise BadOption(f"--case: must name shapes of {', '.join(chosen_ops)}, got {wrong}; see --list")
        planned = [(workload, modes_of(workload, modes)) for workload in chosen]
    else:
        name = one_of("--set", request.set, SETS) if request.set is not None else None
        device_set = name or ("quick" if request.quick else "gpu" if device == "cuda" else "cpu")
        planned = _of_targets(found, modes) if name == "targets" else _of_set(found, device_set, modes)
    planned = [(workload, own) for workload, own in sorted(planned, key=lambda step: _rank(step[0])) if own]
    if not planned:
        raise BadOption(f"--mode: must be one that the chosen ops and cases have, got {', '.join(modes)}")
    return tuple(planned)


def _of_targets(found: Iterable[Workload], modes: tuple[str, ...]) -> list[Step]:
    """Return what the targets need."""
    wanted = {(one.workload, one.mode) for one in TARGETS if one.mode}
    return [(workload, tuple(mode for mode in modes if (workload, mode) in wanted)) for workload in found]


def _of_set(found: Iterable[Workload], name: str, modes: tuple[str, ...]) -> list[Step]:
    """Return a set, with a tiny shape of every op for the cost of dispatch."""
    planned = []
    for workload in found:
        own = modes_of(workload, modes) if in_set(workload, name) else ()
        in_dispatch = "dispatch" in workload.case.sets and workload.role == workload.entry.roles[0]
        if not own and in_dispatch and "dispatch" in modes:
            own = ("dispatch",)
        planned.append((workload, own))
    return planned


def _rank(workload: Workload) -> tuple[bool, bool, bool]:
    """Return what sorts workloads: the most telling first, should the time be over early.

    First the shapes of ``FIRST``, then images of 896 pixels, and of both the composites before the ops.
    """
    name = workload.case.name
    return name not in FIRST, "896" not in name, workload.level != "composite"


def too_slow_to_compile(device: str, workload: Workload) -> bool:
    """Tell whether a run without names leaves out who compiles."""
    case = workload.case
    known = case.name in FIRST if device == "cuda" else getattr(case, "is_even", True)
    entry = workload.entry
    if isinstance(entry, CompositeEntry):
        # the encoder takes minutes; of the others, parts of second_question, that one alone is compiled
        known = known and not entry.encodes and len(entry.parts) > 1
    return not known


def modes_of(workload: Workload, modes: Iterable[str]) -> tuple[str, ...]:
    """Return those that a workload is measured in.

    Composites are inference, and the training step both ways; dispatch, what the CPU does for a call, needs a case so
    small that little else is left.
    """
    if isinstance(workload.entry, CompositeEntry) and workload.entry.trains:
        return tuple(mode for mode in modes if mode == "both")
    allowed = ["forward"] if workload.level == "composite" else ["forward", "backward", "both"]
    if "dispatch" in workload.case.sets:
        allowed.append("dispatch")
    return tuple(mode for mode in modes if mode in allowed)
