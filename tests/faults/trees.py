"""Copies of the working tree in which faults are seeded, and what pytest says of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from .mutant import Mutant

EXTENSION = "hia_kernels/_native*.so"
BUILD = ("setup.py", "build_ext", "--inplace")
PACKAGES = ("hia_kernels", "hia", "bench", "tests")
SLOWEST_S = 600.0  # that one fault's tests, or a build, may take
# What an assertion raises: Python's, pytest.raises where nothing was raised, gradcheck's and opcheck's.
ASSERTIONS = ("AssertionError", "Failed", "GradcheckError", "OpCheckError")
OWN_VARIABLES = ("HIA_", "TRITON_INTERPRET", "PYTEST_ADDOPTS")  # of the caller's shell: tests set their own


class TreeError(RuntimeError):
    """No verdict is possible: the copy, the build or the unmutated tests are not as they must be."""


@dataclass(frozen=True)
class Report:
    """One run of pytest.

    Attributes:
        code: pytest's exit code; None if it was ended for taking too long.
        passed: node ids.
        failed: node ids of tests whose own code raised, and what.
        broken: likewise of fixtures and of files that could not be collected.
        output: the end of what it printed.
    """

    code: int | None
    passed: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    output: str = ""

    def passed_of(self, test: str) -> list[str]:
        """List what passed of ``test``: itself, its parameters, or the tests of a file or class."""
        return [node for node in self.passed if node == test or node.startswith((f"{test}[", f"{test}::"))]

    def caught_by(self) -> list[str]:
        """List the tests that failed by an assertion; none if anything but a test failed."""
        if self.code != 1 or self.broken:
            return []
        return [node for node, message in self.failed.items() if is_assertion(message)]

    def failure(self) -> str:
        """Name the first test that failed, or what else ended the run."""
        problems = {**self.broken, **self.failed}
        return _first(problems) if problems else self.problem()

    def problem(self) -> str:
        """Say why nothing was caught."""
        if self.code is None:
            return f"its tests were ended after {SLOWEST_S:.0f} s"
        if self.code == 0:
            return "its tests pass"
        if self.broken:
            return f"not a test but what surrounds it failed: {_first(self.broken)}"
        if self.failed:
            return f"a test failed, but not by an assertion: {_first(self.failed)}"
        return f"pytest ended with {self.code}: {self.output.strip()[-300:]}"


def _first(problems: dict[str, str]) -> str:
    node, message = next(iter(problems.items()))
    return f"{node}: {message.splitlines()[0][:200] if message else 'no message'}"


def is_assertion(message: str) -> bool:
    """Tell whether a failure's message, as pytest's XML has it, is an assertion's."""
    kind = message.partition("\n")[0].partition(":")[0].strip()
    return message.startswith("assert ") or kind.rpartition(".")[2] in ASSERTIONS


class Processes:
    """The processes that work in the copies. All of them, and what they have started, can be ended at once."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock, self._ended = threading.Lock(), False

    def run(self, command: Sequence[str], cwd: Path, environment: dict[str, str]) -> tuple[int | None, str]:
        """Run a command to its end: its exit code, None if it took too long, and what it printed.

        Raises:
            TreeError: :meth:`end` was called before.
        """
        with self._lock:  # none may begin behind the last one's end
            if self._ended:
                raise TreeError("mutants: interrupted")
            child = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(child)
        try:
            output, _ = child.communicate(timeout=SLOWEST_S)
            return child.returncode, output
        except subprocess.TimeoutExpired:
            _kill(child)
            return None, child.communicate()[0] or ""
        finally:
            with self._lock:
                self._running.discard(child)

    def end(self) -> None:
        """End every process, and let none begin."""
        with self._lock:
            self._ended, running = True, list(self._running)
        for child in running:
            _kill(child)
            child.wait()


def _kill(child: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def project_files(root: Path) -> list[Path]:
    """List what git tracks or would, as it is now, relative to the root; and the built extension.

    Raises:
        TreeError: no repository.
    """
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise TreeError(f"mutants: {root} must be a git repository, got: {done.stderr.strip()}")
    listed = {Path(name) for name in done.stdout.split("\0") if name and (root / name).is_file()}
    return sorted(listed | {path.relative_to(root) for path in root.glob(EXTENSION)})


class Tree:
    """One copy of the working tree.

    Args:
        folder: where it goes; must not exist.
        root: of the working tree.
        processes: that will work in it.
    """

    def __init__(self, folder: Path, root: Path, processes: Processes) -> None:
        self.folder, self.processes = folder, processes
        self._touched = 0
        for path in project_files(root):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / path, folder / path)

    def environment(self, *, interpreter: bool = False) -> dict[str, str]:
        """Make the environment of its processes: its own sources come first."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OWN_VARIABLES)}
        paths = [str(self.folder), str(self.folder / "python"), kept.get("PYTHONPATH", "")]
        kept["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        return kept | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if interpreter else {})

    def check_sources(self) -> None:
        """Raise TreeError unless Python imports the copy's packages: an installed one would hide every fault."""
        folders = (self.folder, self.folder / "python")
        names = [name for name in PACKAGES if any((one / name / "__init__.py").is_file() for one in folders)]
        code = f"import importlib\nfor name in {names!r}: print(importlib.import_module(name).__path__[0])"
        status, output = self.processes.run([sys.executable, "-c", code], self.folder, self.environment())
        found = [Path(line).resolve() for line in output.splitlines()] if status == 0 else []
        elsewhere = [str(path) for path in found if not path.is_relative_to(self.folder.resolve())]
        if elsewhere or len(found) != len(names):
            raise TreeError(
                f"mutants: the packages must be imported from {self.folder}, got {elsewhere or output.strip()[-600:]}"
            )

    def build(self) -> None:
        """Compile csrc/ where it changed.

        Raises:
            TreeError: it does not build; carries the end of the compiler's output.
        """
        status, output = self.processes.run([sys.executable, *BUILD], self.folder, self.environment())
        if status != 0:
            raise TreeError(f"mutants: {' '.join(BUILD)} must succeed, got: {output.strip()[-600:]}")

    def extension(self) -> dict[Path, bytes]:
        """Read the built extension's files."""
        return {path: path.read_bytes() for path in self.folder.glob(EXTENSION)}

    @contextmanager
    def changed(self, mutant: Mutant, *, keep: bool = False) -> Iterator[None]:
        """Put the fault into the copy for the time of the block; with ``keep`` it stays."""
        path, built = self.folder / mutant.file, self.extension() if mutant.native else {}
        text = path.read_text(encoding="utf-8")
        self._write(path, mutant.applied(text))
        try:
            if mutant.native:
                self.build()
            yield
        finally:
            if not keep:
                self._write(path, text)
                for file, content in built.items():
                    file.write_bytes(content)

    def _write(self, path: Path, text: str) -> None:
        """Write a file with a time of its own: Python and ninja tell versions apart by whole seconds."""
        path.write_text(text, encoding="utf-8")
        self._touched = max(self._touched + 1, int(time.time()))
        os.utime(path, (self._touched, self._touched))

    def pytest(self, tests: Sequence[str], *, interpreter: bool, first_failure: bool) -> Report:
        """Run tests in the copy.

        Args:
            tests: node ids.
            interpreter: in Triton's interpreter, those that are marked for it.
            first_failure: stop there.
        """
        results = self.folder / f".mutants-{threading.get_ident()}.xml"
        results.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={results}"]
        command += ["--hypothesis-seed=0"]  # the same examples every time
        command += (["-x"] if first_failure else []) + (["-m", "interpreter"] if interpreter else [])
        code, output = self.processes.run([*command, *tests], self.folder, self.environment(interpreter=interpreter))
        if not results.is_file():
            return Report(code, output=output)
        passed, failed, broken = self._read(results)
        return Report(code, passed, failed, broken, output)

    def _read(self, results: Path) -> tuple[tuple[str, ...], dict[str, str], dict[str, str]]:
        passed, failed, broken = [], {}, {}
        for case in ElementTree.parse(results).iter("testcase"):
            node = self._node_id(case.get("classname") or "", case.get("name") or "")
            failure, error = case.find("failure"), case.find("error")
            if error is not None:
                broken[node] = error.get("message") or ""
            elif failure is not None:
                failed[node] = failure.get("message") or ""
            elif case.find("skipped") is None:
                passed.append(node)
        return tuple(passed), failed, broken

    def _node_id(self, dotted: str, name: str) -> str:
        """Join ``tests.ops.test_core.TestChecks`` and a name. What can't be collected has a name alone."""
        parts = (dotted or name).split(".")
        for count in range(1, len(parts) + 1):
            path = Path(*parts[:count]).with_suffix(".py")
            if (self.folder / path).is_file():
                return "::".join([path.as_posix(), *parts[count:], *([name] if dotted else [])])
        return f"{dotted}::{name}" if dotted else name
