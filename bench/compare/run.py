"""``make bench-compare BASE=<rev>``: two revisions side by side.

The working tree and a git worktree of BASE each run a worker process with the small set of
:mod:`bench.compare.regression`. They take turns, so a drift of the machine hits both, and the median of the paired
ratios decides. A case that seems to have moved is measured again in two more pairs of processes, and the pair with the
median of the three decides.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..progress import Progress
from ..records import environment
from ..records.environment import REPOSITORY, git
from ..records.files import results_folder, shown, write_json
from .regression import write_inputs
from .revisions import WORKER, Pair, Worker, bring_extension, worktree
from .rows import HEADER, VERDICTS, Row

FILE = "compare.json"
PAIRS = 3  # of processes that time a case which seems to have moved
BLOCK_MS = 30.0  # a worker's turn
LONGEST = 2000  # calls in a turn


def measure(row: Row, base: Worker, now: Worker, rounds: int) -> None:
    """Add a pair of processes' rounds to a row, every other round in the opposite order."""
    row.base_ms.append([])
    row.now_ms.append([])
    turns = [(base, row.base_ms[-1]), (now, row.now_ms[-1])]
    try:
        for worker, _ in turns:
            worker.time(row.case, 1)
        times = max(1, min(LONGEST, round(BLOCK_MS / base.time(row.case, 1))))
        for number in range(rounds):
            for worker, values in reversed(turns) if number % 2 else turns:
                values.append(worker.time(row.case, times))
    except RuntimeError as error:
        row.problem = str(error)


def compare(cases: Sequence[str], make_pair: Callable[[], Pair], rounds: int, threshold: float) -> list[Row]:
    """Time all cases with one pair of processes; what seems to have moved with two more, whatever the second says."""
    rows = [Row(case) for case in cases]
    left = rows
    for number in range(PAIRS):
        if number == 1:
            left = [row for row in rows if row.verdict(threshold) not in ("same", "not compared")]
        if not left:
            break
        if number:
            print(f"again, in new processes: {', '.join(row.case for row in left)}", flush=True)
        with contextlib.closing(make_pair()) as pair, Progress(len(left)) as progress:
            for row in left:
                progress.step(row.case)
                measure(row, pair.base, pair.now, rounds)
                progress.done()
                if number in (0, PAIRS - 1) or row.problem is not None:
                    print(row.line(threshold), flush=True)
    return rows


def run(
    base: str,
    cases: Sequence[str],
    *,
    rounds: int,
    threshold: float,
    out: Path | None = None,
    record: bool = False,
    root: Path = REPOSITORY,
) -> int:
    """Compare the working tree with a revision.

    Returns:
        0; 1 if a case became slower by more than the threshold; 2 if nothing could be compared.
    """
    try:
        with worktree(base, root) as tree, tempfile.TemporaryDirectory() as folder:
            script = Path(shutil.copy2(WORKER, Path(folder) / WORKER.name))
            inputs = Path(folder) / "inputs.pt"
            write_inputs(inputs, cases)
            note, revision = bring_extension(tree, root), git("log", "-1", "--format=%h %s", root=tree)
            print(f"base: {revision}\nnow: the working tree of {root}")
            print(*([note] if note else []), HEADER, sep="\n", flush=True)
            rows = compare(cases, lambda: Pair(script, inputs, tree, root.resolve()), rounds, threshold)
    except (ValueError, RuntimeError) as error:
        sys.stderr.write(f"bench compare: {error}\n")
        return 2
    verdicts = [row.verdict(threshold) for row in rows]
    print(", ".join(f"{verdicts.count(name)} {name}" for name in VERDICTS))
    facts = environment.describe("cpu")
    found = {"base": revision, "threshold": threshold, "rows": [row.to_dict(threshold) for row in rows]}
    path = results_folder(facts["device"], out=out, record=record) / FILE
    print(f"written: {shown(write_json(path, {**found, 'environment': facts}))}")
    if all(verdict == "not compared" for verdict in verdicts):
        return 2
    return 1 if "slower" in verdicts else 0
