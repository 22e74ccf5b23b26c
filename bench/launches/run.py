"""Record the launches of Triton kernels on GPUs that aren't there, and compile them: ``python -m bench launches``.

Prints what breaks a target's limits. On a machine with such a GPU the compiled kernels are found in Triton's cache when
they are launched: ``python -m bench launches --target sm_90 --jobs 16 --fresh`` compiles ahead.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.workloads import composites, ops
from hia_kernels.core import triton_support

from . import document, limits
from .compile import FOLDER, compile_all
from .device import TARGETS
from .record import Recording
from .workloads import record


def parser() -> argparse.ArgumentParser:
    """Build the command's parser."""
    names = (*ops(), *composites())
    found = argparse.ArgumentParser(
        prog="python -m bench launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 nothing breaks a limit, 1 something does, 2 wrong arguments or no Triton",
    )
    found.add_argument(
        "--target",
        nargs="+",
        choices=list(TARGETS),
        default=list(TARGETS),
        metavar="TARGET",
        help=f"GPUs to record for, of {', '.join(TARGETS)} (default: all)",
    )
    found.add_argument(
        "--op",
        nargs="+",
        choices=names,
        default=[],
        metavar="OP",
        help=f"ops and composites to record, of {', '.join(names)} (default: all)",
    )
    found.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that compile (default: one a core)",
    )
    found.add_argument(
        "--cache",
        type=Path,
        default=FOLDER,
        metavar="DIR",
        help=f"where results are kept (default: {os.path.relpath(FOLDER)})",
    )
    found.add_argument("--fresh", action="store_true", help="compile what results are kept for, too")
    found.add_argument(
        "--tuned", action="store_true", help="record with the configurations that were measured on such a device"
    )
    found.add_argument("--list", action="store_true", help="print the recorded launches, and compile none")
    found.add_argument(
        "--write", action="store_true", help=f"replace {os.path.relpath(document.PATH)}; every op and target"
    )
    return found


def _progress(started: float) -> Callable[[int, int], None]:
    """A line that is written over on a terminal, every tenth elsewhere."""
    is_terminal = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        if is_terminal or done == total or done % max(1, total // 10) == 0:
            line = f"compiled {done} of {total}, {time.monotonic() - started:.0f} s"
            print(f"\r{line}" if is_terminal else line, end="" if is_terminal else "\n", file=sys.stderr, flush=True)
            if is_terminal and done == total:
                print(file=sys.stderr)

    return show


def _print_launches(recordings: Sequence[Recording]) -> None:
    for recording in recordings:
        for launch, uses in recording.launches.items():
            print(
                f"{recording.target.name} {launch.kernel} {launch.configuration} warps={launch.num_warps} "
                f"stages={launch.num_stages} grid={uses.grids}: {', '.join(uses.workloads)}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Record, compile, report."""
    command = parser()
    options = command.parse_args(arguments)
    if options.jobs < 1:
        command.error(f"--jobs must be at least 1, got {options.jobs}")
    if options.write and (options.op or set(options.target) != set(TARGETS) or options.tuned):
        command.error("--write must cover every op and target, untuned: leave --op, --target and --tuned out")
    if importlib.util.find_spec("triton") is None:
        print("bench.launches: the package triton must be installed, got none", file=sys.stderr)
        return 2
    if triton_support.interpreted():
        print("bench.launches: TRITON_INTERPRET must not be set, got 1", file=sys.stderr)
        return 2
    import triton

    started = time.monotonic()
    recordings = []
    for name in options.target:
        recordings.append(record(TARGETS[name], options.op, tuned=options.tuned))
        print(f"{name}: {len(recordings[-1].launches)} launches recorded", file=sys.stderr, flush=True)
    if options.list:
        _print_launches(recordings)
        return 0
    items = [(launch, recording.target.name) for recording in recordings for launch in recording.launches]
    results = compile_all(
        items, jobs=options.jobs, folder=options.cache, fresh=options.fresh, progress=_progress(started)
    )
    lines = [line for recording in recordings for line in limits.broken(recording, results)]
    print("\n".join([*lines, f"{len(items)} launches, {len(lines)} with problems, {time.monotonic() - started:.0f} s"]))
    if options.write:
        part = document.PATH.with_suffix(".part")
        part.write_text(document.text(recordings, results, triton.__version__), encoding="utf-8")
        part.replace(document.PATH)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
