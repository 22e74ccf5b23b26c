"""Two revisions ready to be timed: the working tree, and BASE in a worktree, each with a process of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..records.environment import REPOSITORY, git

WORKER = REPOSITORY / "bench" / "compare" / "worker.py"


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
            raise RuntimeError(f"bench compare: a worker must use {wanted}, got {first or 'no answer'}")

    def _read(self) -> str:
        return (self.process.stdout.readline() if self.process.stdout else "").strip()

    def time(self, case: str, times: int) -> float:
        """Return milliseconds a call.

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


@contextlib.contextmanager
def worktree(revision: str, root: Path) -> Iterator[Path]:
    """Check a revision out into a temporary folder, which is gone with the block.

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
    """Give BASE its native extension where the working tree has one: copied if sources are equal, else built.

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
        raise RuntimeError(f"bench compare: BASE's native extension must build, got: {done.stderr.strip()[-400:]}")
    return "native extension: built for BASE too"


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
