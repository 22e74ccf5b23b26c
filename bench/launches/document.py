"""docs/compiled.md: what every recorded launch takes of each target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bench.records import markdown
from bench.records.environment import REPOSITORY
from bench.workloads import composites

from .compile import Item, Resources
from .device import TARGETS
from .limits import OTHER_MATRIX, WAIVERS
from .record import Launch, Recording

PATH = REPOSITORY / "docs" / "compiled.md"
NAMED = 3  # workloads of a row; the others are counted


@dataclass
class Row:
    """A kernel with one configuration; launches that differ in what is known of their arguments share it.

    Attributes:
        workloads: that launch it, by name.
        launches: by target, each distinct one.
    """

    workloads: dict[str, None] = field(default_factory=dict)
    launches: dict[str, list[Launch]] = field(default_factory=dict)


def _named(workload: str) -> str:
    """Name a workload without its dtype and row; an op's without the op too, which the kernel says."""
    name = workload.rsplit(" ", 2)[0]
    op, own = name.split(" ", 1)
    return name if op in composites() else own


def rows(recordings: Iterable[Recording]) -> dict[tuple[str, str, int], Row]:
    """Group launches of all targets by kernel, configuration and warps; stages that the launcher leaves out differ."""
    found: dict[tuple[str, str, int], Row] = {}
    for recording in recordings:
        for launch, uses in recording.launches.items():
            key = (launch.kernel, launch.configuration, launch.num_warps)
            row = found.setdefault(key, Row())
            row.workloads |= dict.fromkeys(map(_named, uses.workloads))
            row.launches.setdefault(recording.target.name, []).append(launch)
    return dict(sorted(found.items(), key=lambda entry: entry[0]))


def stages(row: Row) -> str:
    """Name the stages of a row's launches, and those of targets that differ from most."""
    by_target = {
        target: "/".join(sorted({str(launch.num_stages) for launch in launches}))
        for target, launches in row.launches.items()
    }
    if len(set(by_target.values())) == 1:
        return next(iter(by_target.values()))
    most = max(by_target.values(), key=list(by_target.values()).count)
    return ", ".join([most, *(f"{target} {count}" for target, count in by_target.items() if count != most)])


def _cell(results: list[Resources]) -> str:
    """Show the most that any of them takes."""
    if not results:
        return ""
    if any(result.error for result in results):
        return "does not compile"
    registers, spilled, shared, depth = (
        max(getattr(result, name) for result in results) for name in ("registers", "spilled", "shared", "depth")
    )
    matrix = "+".join(dict.fromkeys(name for result in results for name in result.matrix)) or "-"
    return f"{registers} / {spilled} / {shared / 1024:.1f} / {matrix} / {depth or '-'}"


def _workloads(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def text(recordings: Iterable[Recording], results: Mapping[Item, Resources], triton_version: str) -> str:
    """Write the page, in Markdown.

    Args:
        recordings: of every target.
        results: of every launch in them.
        triton_version: that compiled them.
    """
    lines = [
        "# GPU resources of the Triton kernels",
        "",
        f"Recorded and compiled without a GPU by `python -m bench launches --write`, Triton {triton_version}: every "
        "op, forward and backward, at the GPU's workloads and at shapes beyond them, and every composite of "
        "`bench.providers.layers`, as each target would launch it. `tests/compile` asserts that no kernel spills "
        "registers, that shared memory and registers suffice, and that products of 16-bit operands use matrix "
        "instructions.",
        "",
        "Each cell lists registers a thread / bytes spilled a thread / KiB of shared memory a block / matrix "
        "instruction / buffers of the deepest pipelined load. Launches that differ only in the alignment of their "
        "arguments share a row, which shows the maximum over them.",
    ]
    header = ["configuration", "warps", "stages", *TARGETS, "workloads"]
    tables: dict[str, list[list[str]]] = {}
    for (name, described, warps), row in rows(recordings).items():
        cells = [_cell([results[launch, target] for launch in row.launches.get(target, [])]) for target in TARGETS]
        line = [described, str(warps), stages(row), *cells, _workloads(row.workloads)]
        tables.setdefault(name, []).append(line)
    for name, found in tables.items():
        lines += ["", f"## `{name}`", "", *markdown.table(header, found, text=header)]
    lines += ["", "## Exceptions", ""]
    lines += [
        f"- `{waiver.kernel}`, {waiver.target}, {waiver.dtype}: {waiver.spilled} bytes spilled: {waiver.reason}"
        for waiver in WAIVERS
    ]
    lines += [
        f"- `{name}`, {target}: {instruction} in place of {TARGETS[target].matrix}"
        for name, others in OTHER_MATRIX.items()
        for target, instruction in others.items()
    ]
    return "\n".join(lines) + "\n"


def listed(page: str) -> list[tuple[str, str, str, str, tuple[str, ...]]]:
    """Read kernel, configuration, warps, stages and targets of each row back from the page."""
    found, kernel = [], ""
    for line in page.splitlines():
        if line.startswith("## `"):
            kernel = line.strip("# `")
        elif line.startswith("| ") and not line.startswith(("| configuration", "| ---")):
            described, warps, of_targets, *cells, _ = (cell.strip() for cell in line.strip("|").split("|"))
            targets = tuple(target for target, cell in zip(TARGETS, cells, strict=True) if cell)
            found.append((kernel, described, warps, of_targets, targets))
    return found
