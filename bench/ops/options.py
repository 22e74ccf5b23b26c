"""The command line of ``python -m bench ops``."""

from __future__ import annotations

import argparse
import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..measure.roofline import DTYPES
from ..providers.registry import Provider, all_providers
from ..records.record import MODES
from ..records.targets import TARGETS
from ..workloads import CASES, FIRST, CompositeEntry, Workload, composites, in_set, ops, workloads

DEVICES = ("auto", "cpu", "cuda")
DEFAULT_DTYPES = {"cpu": ("fp32",), "cuda": ("bf16",)}
FILTERS = ("op", "case", "provider", "mode", "dtype", "set")
SETS = ("cpu", "gpu", "quick", "targets")


@dataclass(frozen=True)
class Task:
    """A step of the run.

    Attributes:
        workload: op and case.
        modes: in which it is measured.
        dtype: its name.
        providers: who is.
    """

    workload: Workload
    modes: tuple[str, ...]
    dtype: str
    providers: list[Provider]

    @property
    def name(self) -> str:
        """For the progress bar."""
        return f"{self.workload.op} {self.workload.name} {self.dtype}"


@dataclass(frozen=True)
class Resume:
    """Where a fresh process goes on after the device failed in the one before.

    Attributes:
        number: of the first task.
        without: providers that it leaves out there: in their work the device failed.
    """

    number: int = 0
    without: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Resume:
        """The inverse of ``str``, for argparse."""
        number, colon, without = text.partition(":")
        if not number.isdigit() or not colon:
            raise argparse.ArgumentTypeError(f"must be NUMBER:[PROVIDER,...] as a failed run prints it, got {text!r}")
        return cls(int(number), tuple(name for name in without.split(",") if name))

    def __str__(self) -> str:
        return f"{self.number}:{','.join(self.without)}"

    def providers(self, number: int, found: Iterable[Provider]) -> list[Provider]:
        """Those that a task still asks: nobody in a task before the first."""
        without = self.without if number == self.number else ()
        return [one for one in found if one.name not in without] if number >= self.number else []

    def after(self, number: int, culprit: str, known: Iterable[str]) -> Resume:
        """Behind a failure: the task again without the culprit, or the next one if it was none of the providers."""
        if culprit not in known:
            return Resume(number + 1)
        return Resume(number, (*(self.without if number == self.number else ()), culprit))


def add_resume(parser: Any) -> None:
    """The flag."""
    parser.add_argument(
        "--resume",
        type=Resume.parse,
        default=Resume(),
        metavar="POINT",
        help="go on in a fresh process, as a run that a failed device ended says",
    )


def build_parser() -> argparse.ArgumentParser:
    """All flags; names may be patterns such as ``13b-*``, repeated, or separated by commas."""
    parser = argparse.ArgumentParser(
        prog="python -m bench ops",
        description="Every op and composite of the adapter beside every peer and the device's limits. A provider is "
        "timed only after its output passed the tests' tolerance. Exit code 1 if one failed, 130 after Ctrl-C.",
    )
    chosen = parser.add_argument_group("what is measured; all can be repeated")
    known = ", ".join(ops() + composites())
    chosen.add_argument("--op", action="append", metavar="NAME", help=f"{known}, ops, composites")
    chosen.add_argument(
        "--case", action="append", metavar="NAME", help="shapes of bench/workloads, or all (default: the device's set)"
    )
    chosen.add_argument(
        "--set",
        metavar="NAME",
        help="cpu, gpu or quick: what a run without --case takes there; targets: those of python -m bench targets",
    )
    chosen.add_argument("--provider", action="append", metavar="NAME", help="who is measured (default: all)")
    chosen.add_argument(
        "--dtype", action="append", metavar="DTYPE", help="fp32, bf16, fp16 (default: fp32 on the CPU, bf16 on CUDA)"
    )
    chosen.add_argument("--mode", action="append", metavar="MODE", help=f"{', '.join(MODES)} (default: all)")
    chosen.add_argument("--device", default="auto", metavar="DEVICE", help="cpu, cuda, or auto (default)")
    chosen.add_argument(
        "--quick", action="store_true", help="tiny shapes, few repetitions, nothing compiled: a smoke test"
    )
    chosen.add_argument(
        "--minutes", type=float, metavar="M", help="begin nothing new after that long, and limit what compiles"
    )
    add_resume(chosen)
    output = parser.add_argument_group("output")
    output.add_argument("--list", action="store_true", help="print what would be measured, and exit")
    output.add_argument("--json", metavar="PATH", help="write the records here too")
    output.add_argument(
        "--out", metavar="DIR", help="of kernels.json (if nothing is filtered, default: bench/results/<device>)"
    )
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Checked flags; ``dtype``, ``mode`` and ``provider`` as tuples, and ``plan``: workloads and their modes.

    Raises:
        SystemExit: a value that isn't allowed; the message names the flag, what it takes, and the nearest names.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    options.filtered = options.quick or any(getattr(options, name) for name in FILTERS)
    try:
        (options.device,) = names("--device", [options.device], DEVICES)
        if options.device == "auto":
            options.device = "cuda" if torch.cuda.is_available() else "cpu"
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: cuda needs a CUDA device and a torch built for it, got none; use --device cpu")
        if options.minutes is not None and not options.minutes > 0:
            raise ValueError(f"--minutes: must be more than 0, got {options.minutes:g}")
        options.dtype = names("--dtype", options.dtype or DEFAULT_DTYPES[options.device], tuple(DTYPES))
        options.mode = names("--mode", options.mode or MODES, MODES)
        options.provider = names("--provider", options.provider or ["*"], tuple(all_providers()))
        if options.set is not None:
            (options.set,) = names("--set", [options.set], SETS)
        options.plan = plan(options)
    except ValueError as error:
        parser.error(str(error))
    options.json = Path(options.json) if options.json else None
    options.out = Path(options.out) if options.out else None
    return options


def plan(options: argparse.Namespace) -> list[tuple[Workload, tuple[str, ...]]]:
    """The workloads of the chosen ops and cases, the most telling first, each with its modes.

    Raises:
        ValueError: an unknown op or case, ops that don't occur in the chosen cases, or modes that don't.
    """
    groups = {"ops": ops(), "composites": composites()}
    given = [name for value in options.op or ["ops", "composites"] for name in groups.get(value, (value,))]
    chosen_ops = names("--op", given, ops() + composites())
    found = [workload for op in chosen_ops for workload in workloads(op)]
    if options.case:
        known = tuple(dict.fromkeys((*CASES, *(workload.name for workload in found))))
        wanted = set(names("--case", ["*" if value == "all" else value for value in options.case], known))
        chosen = [workload for workload in found if wanted & {workload.name, workload.case.name}]
        if not chosen:
            wrong = ", ".join(options.case)
            raise ValueError(f"--case: must name shapes of {', '.join(chosen_ops)}, got {wrong}; see --list")
        planned = [(workload, modes_of(workload, options.mode)) for workload in chosen]
    else:
        planned = _default_plan(found, options)
    planned.sort(key=lambda item: _rank(item[0]))
    planned = [(workload, modes) for workload, modes in planned if modes]
    if not planned:
        raise ValueError(f"--mode: must be one that the chosen ops and cases have, got {', '.join(options.mode)}")
    return planned


def _default_plan(found: list[Workload], options: argparse.Namespace) -> list[tuple[Workload, tuple[str, ...]]]:
    """The set asked for, else the device's with a tiny shape of every op for the cost of dispatch."""
    if options.set == "targets":
        wanted = [(one.workload, one.mode) for one in TARGETS if one.mode]
        kept = [(workload, [mode for mode in options.mode if (workload, mode) in wanted]) for workload in found]
        return [(workload, tuple(modes)) for workload, modes in kept]
    device_set = options.set or ("quick" if options.quick else "gpu" if options.device == "cuda" else "cpu")
    planned = []
    for workload in found:
        modes = modes_of(workload, options.mode) if in_set(workload, device_set) else ()
        in_dispatch = "dispatch" in workload.case.sets and workload.role == workload.entry.roles[0]
        if not modes and in_dispatch and "dispatch" in options.mode:
            modes = ("dispatch",)
        planned.append((workload, modes))
    return planned


def _rank(workload: Workload) -> tuple[bool, bool, bool]:
    """The most telling first, should the time be over early: the first shapes, then images of 896 pixels, and of both
    the composites before the ops."""
    name = workload.case.name
    return name not in FIRST, "896" not in name, workload.level != "composite"


def tasks_of(options: Any, providers: list[Provider]) -> list[Task]:
    """In order. On CUDA, where nothing was asked for by name, compiling comes last and for the first shapes only:
    max-autotune takes as long as everything else together. The other shapes get a row that says so."""
    if options.filtered or options.device == "cpu":
        return [Task(*item, dtype, providers) for dtype in options.dtype for item in options.plan]
    plain = [provider for provider in providers if not provider.compiles]
    compiled = [provider for provider in providers if provider.compiles]
    first = [item for item in options.plan if not too_slow_to_compile("cuda", item[0])]
    tasks = [
        Task(*item, dtype, plain if item in first else providers) for dtype in options.dtype for item in options.plan
    ]
    return tasks + [Task(*item, dtype, compiled) for dtype in options.dtype for item in first]


def too_slow_to_compile(device: str, workload: Workload) -> bool:
    """Whether a run without names leaves out who compiles."""
    case = workload.case
    known = case.name in FIRST if device == "cuda" else getattr(case, "is_even", True)
    entry = workload.entry
    if isinstance(entry, CompositeEntry):
        # the encoder takes minutes; of the others, parts of second_question, that one alone is compiled
        known = known and not entry.encodes and len(entry.parts) > 1
    return not known


def modes_of(workload: Workload, modes: Iterable[str]) -> tuple[str, ...]:
    """Those that a workload is measured in: composites are inference, and the training step both ways; dispatch,
    what the CPU does for a call, needs a case so small that little else is left."""
    if isinstance(workload.entry, CompositeEntry) and workload.entry.trains:
        return tuple(mode for mode in modes if mode == "both")
    allowed = ["forward"] if workload.level == "composite" else ["forward", "backward", "both"]
    if "dispatch" in workload.case.sets:
        allowed.append("dispatch")
    return tuple(mode for mode in modes if mode in allowed)


def names(flag: str, given: Iterable[str], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Split at commas, patterns expanded, in the order allowed, without repeats.

    Raises:
        ValueError: a name or pattern that fits none; the nearest are offered.
    """
    values = [part.strip() for value in given for part in value.split(",") if part.strip()]
    if not values:
        raise ValueError(f"{flag}: must name at least one of {', '.join(allowed[:12])}, got none")
    found: set[str] = set()
    for value in values:
        matching = fnmatch.filter(allowed, value)
        if not matching:
            raise ValueError(f"{flag}: must be {_known(allowed)}, got {value!r}{_hint(value, allowed)}")
        found.update(matching)
    return tuple(name for name in allowed if name in found)


def _known(allowed: tuple[str, ...]) -> str:
    if len(allowed) > 24:
        return f"one of {len(allowed)} names that --list prints"
    return f"among {', '.join(allowed)}"


def _hint(value: str, allowed: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(value, allowed, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else ""
