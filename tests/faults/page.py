"""``docs/mutants.md``: the faults, and the tests that caught them in the last whole run."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from .runner import Verdict

PAGE = Path("docs/mutants.md")
COMMAND = 'make mutants ARGS="--write"'
AREAS = {"csrc": "Native kernels", "python": "Adapter and runtime", "bench": "Benchmarks", "tests": "Benchmarks"}


def page(verdicts: Sequence[Verdict], source: str, seconds: float) -> str:
    """Write the page's text.

    Args:
        verdicts: of every fault, all caught.
        source: of :func:`source_of`.
        seconds: that the run took.
    """
    lines = [
        "# Seeded faults",
        "",
        "Each row is a fault in one line of the code, and the test that fails because of it. `make mutants` puts the "
        "faults into a copy of the tree one at a time, and fails unless an assertion catches every one. "
        "[CONTRIBUTING.md](../CONTRIBUTING.md#seeded-faults) says how to add one. The command writes this page: don't "
        "edit it.",
        "",
        f"{source}: {len(verdicts)} of {len(verdicts)} caught in {seconds / 60:.1f} minutes.",
    ]
    for area, members in groupby(verdicts, key=_area):
        lines += [
            "",
            f"## {area}",
            "",
            "| fault | kind | file | what it would do | caught by |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(verdict) for verdict in members]
    return "\n".join(lines) + "\n"


def _area(verdict: Verdict) -> str:
    first = verdict.mutant.file.partition("/")[0]
    kernels = "Triton kernels" if verdict.mutant.interpreter else "References, CPU paths and what the ops share"
    return AREAS.get(first, kernels)


def _row(verdict: Verdict) -> str:
    mutant = verdict.mutant
    tests = "<br>".join(f"`{test}`" for test in verdict.caught_by)
    cells = (f"`{mutant.name}`", mutant.kind, f"`{mutant.file}`", mutant.why, tests)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def source_of(root: Path) -> str:
    """Say what is run, on which commit and machine; to be asked before the run, while the tree is what is copied."""
    from bench.records.environment import describe

    found = describe("cpu")
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changes = " with uncommitted changes" if found["dirty"] else ""
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "triton", "transformers"))
    return (
        f"`{COMMAND}` at commit {commit.stdout.strip()}{changes}, {found['device']}, {found['cores']} cores, {versions}"
    )
