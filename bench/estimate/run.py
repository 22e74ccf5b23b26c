"""``python -m bench estimate``: lists every workload's kernels, compiles them, and prints or writes the page."""

from __future__ import annotations

from collections.abc import Sequence

from ..launches.device import TARGETS
from ..progress import Progress
from ..records import environment
from ..records.files import write_text
from ..workloads import Workload
from . import page
from .collect import collect
from .compiled import compiled

TARGET = TARGETS["sm_90"]  # of an H100 and of an H200


def run(
    chosen: Sequence[Workload],
    devices: page.Devices,
    *,
    launch_s: float,
    jobs: int,
    write: bool,
) -> int:
    """Estimate workloads.

    Args:
        chosen: ops and composites.
        devices: what was measured on each.
        launch_s: of a kernel.
        jobs: processes that compile.
        write: replace the page in ``docs``; else print it.

    Returns:
        0.
    """
    made = made_by()
    with Progress(len(chosen)) as progress:

        def begin(workload: Workload, number: int) -> None:
            progress.done(number - progress.finished)
            progress.step(f"{workload.op} {workload.name}")

        works = collect(chosen, TARGET, begin)
    launches = dict.fromkeys(step.launch for work in works for step in work.steps if step.launch is not None)
    with Progress(len(launches)) as progress:
        progress.step("compiling")
        found = compiled(launches, TARGET, jobs, lambda done, _total: progress.done(done - progress.finished))
    content = page.text(works, found, devices, launch_s, made)
    if write:
        write_text(page.PATH, content)
    else:
        print(content, end="")
    return 0


def made_by() -> str:
    """Name command, versions and commit in a line of Markdown."""
    facts = environment.describe("cpu")
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "triton"))
    return f"Written by `{facts['command']}` at commit {environment.commit_of(facts)}, without a GPU; {versions}."
