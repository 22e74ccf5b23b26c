"""examples/ runs as a user runs it: elsewhere, on the two packages alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
IMPORTS_OURS = re.compile(r"^\s*(?:from|import) (?:bench|tests)\b", re.MULTILINE)
EXPECTED = {
    "operators.py": "served by cpu",
    "two_radiographs.py": "Where is the lesion?",
    "train.py": "answered word for word after loading",
}


def test_every_example_is_run_and_listed():
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert sorted(EXPECTED) == [path.name for path in EXAMPLES]
    assert all(f"]({name})" in page for name in EXPECTED)


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """Return a folder that holds the two packages and nothing else of the repository."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "hia_kernels").symlink_to(ROOT / "hia_kernels", target_is_directory=True)
    (folder / "hia").symlink_to(ROOT / "python" / "hia", target_is_directory=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path: Path, packages: Path, tmp_path: Path):
    assert not IMPORTS_OURS.search(path.read_text(encoding="utf-8")), f"{path.name} imports bench or tests"
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(packages), "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{path.name}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert EXPECTED[path.name] in done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind unless it is told a folder"
