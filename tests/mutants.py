"""Seed faults into a copy of this tree, one at a time, and demand that a test fails by an assertion for each.

The working tree is not touched. The listed tests first run once without a fault and must pass. An import error, a test
that can't be collected, or no test at all is not a fault caught. Exit code: 0 if every fault is caught, 1 if not, 2 if
nothing can be said: a fault whose code has moved, a listed test that fails by itself, csrc/ that does not build.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # in place of tests/, whose compare.py and inputs.py are no top-level modules

from tests.faults import MUTANTS, Mutant, StaleFault  # noqa: E402
from tests.faults.page import PAGE, page, source_of  # noqa: E402
from tests.faults.runner import Verdict, examine  # noqa: E402
from tests.faults.trees import TreeError  # noqa: E402


def parse(arguments: Sequence[str] | None, mutants: Sequence[Mutant]) -> tuple[argparse.Namespace, list[Mutant]]:
    """Read the flags, and choose the faults.

    Raises:
        SystemExit: a value that isn't allowed.
    """
    parser = argparse.ArgumentParser(
        prog="python tests/mutants.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults instead of all; --list shows the names")
    parser.add_argument("--list", action="store_true", help="print name, kind, file and tests of each fault, and stop")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(2, os.cpu_count() or 1),
        metavar="N",
        help="copies of the tree at work at once (default: %(default)s)",
    )
    parser.add_argument(
        "--write", action="store_true", help=f"write {PAGE} if every fault is caught; not together with --only"
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the copies and say where; a single fault stays in its copy"
    )
    options = parser.parse_args(arguments)
    known = {mutant.name: mutant for mutant in mutants}
    for name in options.only or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; --list shows the names"
            parser.error(f"--only: must name a fault, got {name!r}{hint}")
    if options.jobs < 1:
        parser.error(f"--jobs: must be at least 1, got {options.jobs}")
    if options.write and options.only:
        parser.error("--write: must be of all faults, got --only too")
    return options, [known[name] for name in dict.fromkeys(options.only)] if options.only else list(mutants)


def say(line: str) -> None:
    """Print at once, for whoever waits."""
    print(line, flush=True)


def summary(verdicts: Sequence[Verdict], seconds: float) -> list[str]:
    """Say how many were caught, in what time, and which were not."""
    missed = [verdict for verdict in verdicts if not verdict.caught_by]
    lines = [f"{len(verdicts) - len(missed)} of {len(verdicts)} faults caught in {seconds:.0f} s"]
    lines += [f"NOT CAUGHT  {one.mutant.name} ({one.mutant.file}): {one.problem}" for one in missed]
    return lines


def main(arguments: Sequence[str] | None = None, root: Path = ROOT, mutants: Sequence[Mutant] = MUTANTS) -> int:
    """Run the command; see the module's text for the exit code."""
    options, chosen = parse(arguments, mutants)
    if options.list:
        for mutant in chosen:
            say(f"{mutant.name}\n  {mutant.kind}: {mutant.why}\n  {mutant.file}")
            say("\n".join(f"  {test}" for test in mutant.tests))
        return 0
    source, began = source_of(root) if options.write else "", time.perf_counter()
    try:
        verdicts = examine(root, chosen, options.jobs, say, keep=options.keep)
    except (StaleFault, TreeError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the working tree is as it was\n")
        return 130
    seconds = time.perf_counter() - began
    print(*summary(verdicts, seconds), sep="\n", flush=True)
    if not all(verdict.caught_by for verdict in verdicts):
        return 1
    if options.write:
        (root / PAGE).write_text(page(verdicts, source, seconds), encoding="utf-8")
        say(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
