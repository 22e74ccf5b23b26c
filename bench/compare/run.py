"""Two revisions side by side: ``make bench-compare BASE=<rev>``.

The working tree and a git worktree of BASE each run a worker process with the small set of
``bench.compare.regression``.
They take turns, so a drift of the machine hits both, and the median of the paired ratios decides. A case that
seems to have moved is measured again in two more pairs of processes, and the median of the three decides.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..records.environment import REPOSITORY
from .regression import cases, write_inputs

WORKER = REPOSITORY / "bench" / "compare" / "worker.py"
THRESHOLD = 0.10
ROUNDS = 15
PAIRS = 3  # of processes that time a case which seems to have moved
BLOCK_MS = 30.0  # a worker's turn
LONGEST = 2000  # calls in a turn
VERDICTS = ("slower", "faster", "same", "noisy", "not compared")
RULE = (
    "The rule: in each round both revisions are timed one after the other, and the round's ratio is now over base; a "
    "pair of processes has the median of its rounds. Within the threshold in the first pair, a case is the same. "
    f"Beyond it, {PAIRS - 1} more pairs are run, and the median of all {PAIRS} decides: slower, if it is above 1 + "
    "threshold; faster, below 1 / (1 + threshold); noisy, if it is either and some pair points the other way; else "
    "the same. Only slower fails."
)


@dataclass
class Row:
    """One case.

    Attributes:
        case: of ``bench.compare.regression``.
        base_ms: BASE's milliseconds: one list a pair of processes, one number a round.
        now_ms: likewise, the working tree's.
        problem: why it can't be compared; None if it can.
    """

    case: str
    base_ms: list[list[float]] = field(default_factory=list)
    now_ms: list[list[float]] = field(default_factory=list)
    problem: str | None = None

    def ratios(self, pair: int) -> list[float]:
        """Now over base, round by round, of one pair of processes."""
        return [now / base for base, now in zip(self.base_ms[pair], self.now_ms[pair], strict=True)]

    @property
    def medians(self) -> list[float]:
        """The median of the paired ratios, one for each pair of processes."""
        return [statistics.median(self.ratios(pair)) for pair in range(len(self.base_ms))]

    @property
    def ratio(self) -> float:
        """The median of the pairs' medians.

        Where a process's memory happens to lie can cost more than 10 % all its life: of three pairs of processes
        one such is outvoted.
        """
        return statistics.median(self.medians)

    def verdict(self, threshold: float) -> str:
        """ "slower", "faster", "same", "noisy" or "not compared"; see :data:`RULE`."""
        if self.problem is not None:
            return "not compared"
        if 1 / (1 + threshold) <= self.ratio <= 1 + threshold:
            return "same"
        word = "slower" if self.ratio > 1 else "faster"
        contradicted = any((median > 1) != (self.ratio > 1) for median in self.medians)
        return "noisy" if contradicted else word


class Worker:
    """A process that times one revision's cases.

    Args:
        script: a copy of ``bench/compare/worker.py``.
        inputs: the file of its inputs.
        tree: the revision's checkout.
        name: of the revision, for messages.

    Raises:
        RuntimeError: it doesn't start, or imports another checkout.
    """

    def __init__(self, script: Path, inputs: Path, tree: Path, name: str) -> None:
        self.name = name
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "python")])}
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(inputs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
            env=environment,
        )
        first = self._read()
        wanted = str(tree / "hia_kernels")
        if not first.startswith(f"ready {wanted}"):
            self.close()
            raise RuntimeError(f"bench.compare.run: a worker must use {wanted}, got {first or 'no answer'}")

    def _read(self) -> str:
        return (self.process.stdout.readline() if self.process.stdout else "").strip()

    def time(self, case: str, times: int) -> float:
        """Milliseconds a call.

        Raises:
            RuntimeError: this revision can't run the case, or the process died.
        """
        if self.process.stdin is None or self.process.poll() is not None:
            raise RuntimeError(f"{self.name} can't run it: its process has ended")
        self.process.stdin.write(f"{case} {times}\n")
        self.process.stdin.flush()
        answer = self._read()
        if not answer or answer.startswith("error: "):
            why = answer.removeprefix("error: ") or "its process has ended"
            raise RuntimeError(f"{self.name} can't run it: {why}")
        return float(answer)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def git(*arguments: str, root: Path) -> str:
    """Its output.

    Raises:
        RuntimeError: with what git says.
    """
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def worktree(revision: str, root: Path) -> Iterator[Path]:
    """A checkout of a revision in a temporary folder, gone with the block.

    Raises:
        ValueError: no such revision.
    """
    try:
        commit = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", root=root)
    except RuntimeError as error:
        raise ValueError(f"BASE: must be a revision of this repository, got {revision!r}") from error
    with tempfile.TemporaryDirectory(prefix="hia-base-") as folder:
        tree = Path(folder).resolve() / "tree"
        git("worktree", "add", "--detach", str(tree), commit, root=root)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree), root=root)


def bring_extension(tree: Path, root: Path) -> str | None:
    """Where the working tree has the native extension, give BASE its own: copied if sources are equal, else built.

    Returns:
        What was done, in words; None if there is no extension.

    Raises:
        RuntimeError: the build failed.
    """
    built = list((root / "hia_kernels").glob("_native*.so"))
    if not built:
        return None
    if not git("diff", "--name-only", git("rev-parse", "HEAD", root=tree), "--", "csrc", "setup.py", root=root):
        for path in built:
            shutil.copy2(path, tree / "hia_kernels" / path.name)
        return "native extension: the same in both"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"bench.compare.run: BASE's native extension must build, got: {done.stderr.strip()[-400:]}")
    return "native extension: built for BASE too"


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


class Pair:
    """BASE's worker and the working tree's, both of them fresh.

    Args:
        script: what they run.
        inputs: the file of their inputs.
        base: BASE's checkout.
        now: the working tree.
    """

    def __init__(self, script: Path, inputs: Path, base: Path, now: Path) -> None:
        self.base = Worker(script, inputs, base, "BASE")
        try:
            self.now = Worker(script, inputs, now, "the working tree")
        except RuntimeError:
            self.base.close()
            raise

    def close(self) -> None:
        """End both."""
        self.base.close()
        self.now.close()


def compare(cases: Sequence[str], make_pair: Callable[[], Pair], rounds: int, threshold: float) -> list[Row]:
    """All cases with one pair of processes; what seems to have moved with two more, whatever the second one says."""
    rows = [Row(case) for case in cases]
    left = rows
    for number in range(PAIRS):
        if number == 1:
            left = [row for row in rows if row.verdict(threshold) not in ("same", "not compared")]
        if not left:
            break
        if number:
            print(f"again, in new processes: {', '.join(row.case for row in left)}", flush=True)
        with contextlib.closing(make_pair()) as pair:
            for row in left:
                measure(row, pair.base, pair.now, rounds)
                print(line_of(row, threshold), flush=True)
    return rows


def header() -> str:
    """Of the table."""
    return f"{'case':<22} {'base ms':>10} {'now ms':>10} {'now/base':>9} {'p20 - p80':>13} {'rounds':>6}  verdict"


def line_of(row: Row, threshold: float) -> str:
    """A row of the table."""
    verdict = row.verdict(threshold)
    if row.problem is not None:
        return f"{row.case:<22} {verdict}: {row.problem}"
    base, now = row.base_ms[-1], row.now_ms[-1]
    ratios = row.ratios(-1)
    cuts = statistics.quantiles(ratios, n=5, method="inclusive") if len(ratios) > 1 else [row.ratio] * 4
    spread = f"{cuts[0]:.2f} - {cuts[3]:.2f}"
    return (
        f"{row.case:<22} {statistics.median(base):10.4f} {statistics.median(now):10.4f} "
        f"{row.ratio:9.3f} {spread:>13} {len(ratios):6}  {verdict}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parsed flags.

    Raises:
        SystemExit: a value that isn't allowed.
    """
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__, epilog=RULE)
    parser.add_argument("base", metavar="BASE", help="revision to compare the working tree with")
    known = cases()
    parser.add_argument("--case", nargs="+", default=list(known), metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"pairs a case (default: {ROUNDS})")
    parser.add_argument(
        "--threshold",
        type=float,
        default=100 * THRESHOLD,
        metavar="PERCENT",
        help="a median that is slower by more fails, by the rule below (default: 10)",
    )
    options = parser.parse_args(arguments)
    for case in options.case:
        if case not in known:
            near = difflib.get_close_matches(case, known, n=2, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            parser.error(f"--case: must be among {', '.join(known)}, got {case!r}{hint}")
    if options.rounds < 2 or options.threshold <= 0:
        parser.error(
            f"--rounds and --threshold: must be at least 2 and above 0, got {options.rounds} and {options.threshold:g}"
        )
    return options


def main(arguments: list[str] | None = None, root: Path = REPOSITORY) -> int:
    """Compare.

    Returns:
        0; 1 if a case became slower by more than the threshold; 2 if nothing could be compared.
    """
    options = parse(arguments)
    threshold = options.threshold / 100
    try:
        with worktree(options.base, root) as tree, tempfile.TemporaryDirectory() as folder:
            script = Path(shutil.copy2(WORKER, Path(folder) / WORKER.name))
            inputs = Path(folder) / "inputs.pt"
            write_inputs(inputs, options.case)
            note = bring_extension(tree, root)
            print(f"base: {git('log', '-1', '--format=%h %s', root=tree)}\nnow: the working tree of {root}")
            print(*([note] if note else []), header(), sep="\n", flush=True)
            rows = compare(options.case, lambda: Pair(script, inputs, tree, root.resolve()), options.rounds, threshold)
    except (ValueError, RuntimeError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    verdicts = [row.verdict(threshold) for row in rows]
    print(", ".join(f"{verdicts.count(name)} {name}" for name in VERDICTS))
    if all(verdict == "not compared" for verdict in verdicts):
        return 2
    return 1 if "slower" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
