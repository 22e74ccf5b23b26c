"""README.md and docs/ work: every Python block runs, every command that README.md calls runnable exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hia_kernels.info import support_matrix
from tests.readme import README, CodeBlock, code_blocks, python_blocks, runnable_commands

ROOT = Path(__file__).resolve().parent.parent
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
SECONDS = 300


def test_readme_has_an_example_and_the_two_commands():
    assert README.exists(), "README.md is missing"
    assert python_blocks(TEXT), "README.md has no ```python block"
    commands = runnable_commands(TEXT)
    for command in ("make table3", "make test"):
        assert command in commands, f"README.md: no ```bash run block holds `{command}`, got {commands}"


def test_the_support_matrix_is_that_of_the_tables():
    opening, closing = "<!-- support: written by python -m hia_kernels.info --matrix -->", "<!-- /support -->"
    assert opening in TEXT and closing in TEXT, "README.md lacks the markers of the support matrix"
    block = TEXT.partition(opening)[2].partition(closing)[0].strip()
    assert block == support_matrix(), "README.md: `python -m hia_kernels.info --matrix` prints another support matrix"


def test_examples_import_installed_packages_alone():
    imports = re.compile(r"^\s*(?:from|import) (bench|tests)\b", re.MULTILINE)
    pages = {page: page.read_text(encoding="utf-8") for page in (README, *sorted((ROOT / "docs").glob("*.md")))}
    broken = [
        f"{page.name}:{block.line}: imports {imports.search(block.code)[1]}"
        for page, text in pages.items()
        for block in python_blocks(text)
        if imports.search(block.code)
    ]
    assert not broken, f"an example must run where nothing but the package is installed: {broken}"


def blocks_of_all_pages() -> list:
    pages = [page for page in (README, *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
    return [
        pytest.param(page.name, block, id=f"{page.name}:{block.line}")
        for page in pages
        for block in python_blocks(page.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize(("page", "block"), blocks_of_all_pages())
def test_python_block_runs(page: str, block: CodeBlock):
    path = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", block.code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{page}, block at line {block.line}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_blocks_and_commands_are_found():
    text = "a\n```bash run\nmake test  # all\n# why\npython -m x \\\n    --y\n```\n- b\n  ```python\n  c = 1\n  ```\n"
    bash, python = code_blocks(text)
    assert (bash.language, bash.flags, bash.line) == ("bash", ("run",), 3)
    assert (python.code, python.line) == ("c = 1\n", 10)
    assert runnable_commands(text) == ["make test", "python -m x --y"]
    assert runnable_commands(text.replace("bash run", "bash")) == []


def test_unclosed_block_is_an_error():
    with pytest.raises(ValueError, match="ends inside a code block opened with '```python'"):
        code_blocks("```python\nx = 1\n")
