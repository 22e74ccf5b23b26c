"""The plugin of the GPU's tests: what passed is left out, what did not run is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import os, pytest
def test_fine():
    with open("runs", "a") as file:
        file.write("x")
def test_other():
    assert os.environ.get("MENDED")
@pytest.mark.skipif(not os.environ.get("MENDED"), reason=os.environ.get("REASON", "no reason"))
def test_skipped():
    pass
"""


def run(folder, *arguments, **environment):
    (folder / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.going_on", "--passed", "passed.txt", "-c", os.devnull]
    command += ["--rootdir", ".", "-p", "no:cacheprovider", *arguments, "test_some.py"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", **environment}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def passed(folder):
    return [line.partition("::")[2] for line in (folder / "passed.txt").read_text().splitlines()]


@pytest.mark.parametrize("spread", [(), ("-n", "2")], ids=["alone", "spread"])
def test_what_passed_is_left_out(spread, tmp_path):
    if spread:
        pytest.importorskip("xdist")
    code, printed = run(tmp_path, *spread)
    assert (code, passed(tmp_path)) == (1, ["test_fine"]), printed
    code, printed = run(tmp_path, *spread, MENDED="1")
    assert code == 0 and sorted(passed(tmp_path)) == ["test_fine", "test_other", "test_skipped"], printed
    assert (tmp_path / "runs").read_text() == "x" and "1 tests passed before" in printed
    code, printed = run(tmp_path, *spread, MENDED="1")
    assert code == 0, printed


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("could not import 'peft'", 0), ("NO REAL DATA: none", 0), ("no CUDA device here", 1)],
)
def test_what_was_skipped_has_not_run(reason, expected, tmp_path):
    code, printed = run(tmp_path, "--deselect", "test_some.py::test_other", REASON=reason)
    assert code == expected, printed
    assert ("DID NOT RUN" in printed) == bool(expected)


def test_what_nobody_came_to_has_not_run(tmp_path):
    code, printed = run(tmp_path, "-x", "--deselect", "test_some.py::test_fine")
    assert code == 1 and "DID NOT RUN 1 tests, test_some.py::test_skipped among them" in printed
