"""``python -m bench launches``: records what the Triton kernels launch on GPUs that aren't there, and compiles it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..progress import Progress
from ..records.files import write_text
from . import document, limits
from .compile import compile_all
from .device import TARGETS
from .record import Recording
from .workloads import record


def print_launches(recordings: Sequence[Recording]) -> None:
    """Print every launch, and who launches it."""
    for recording in recordings:
        for launch, uses in recording.launches.items():
            print(
                f"{recording.target.name} {launch.kernel} {launch.configuration} warps={launch.num_warps} "
                f"stages={launch.num_stages} grid={uses.grids}: {', '.join(uses.workloads)}"
            )


def record_each(targets: Sequence[str], ops: Sequence[str], *, tuned: bool) -> list[Recording]:
    """Record the launches on each target, one after the other."""
    found = []
    for name in targets:
        found.append(record(TARGETS[name], ops, tuned=tuned))
        print(f"{name}: {len(found[-1].launches)} launches recorded", file=sys.stderr, flush=True)
    return found


def run(recordings: Sequence[Recording], *, jobs: int, cache: Path, fresh: bool, write: bool) -> int:
    """Compile recorded launches, and print what breaks a target's limits.

    Args:
        recordings: of some targets.
        jobs: processes that compile.
        cache: where results are kept.
        fresh: compile what results are kept for, too.
        write: replace the page in ``docs``.

    Returns:
        0; 1 if something breaks a limit.
    """
    import triton

    started = time.monotonic()
    items = [(launch, recording.target.name) for recording in recordings for launch in recording.launches]
    with Progress(len(items)) as progress:

        def compiled(done: int, total: int) -> None:
            progress.done(len(items) - total + done - progress.finished)
            progress.step("compiling")

        results = compile_all(items, jobs=jobs, folder=cache, fresh=fresh, progress=compiled)
    lines = [line for recording in recordings for line in limits.broken(recording, results)]
    print("\n".join([*lines, f"{len(items)} launches, {len(lines)} with problems, {time.monotonic() - started:.0f} s"]))
    if write:
        write_text(document.PATH, document.text(recordings, results, triton.__version__))
    return 1 if lines else 0
