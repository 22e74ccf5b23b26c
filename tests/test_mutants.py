"""The list of seeded faults is whole and applies; the runner counts as caught what is caught and nothing else."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import textwrap
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests import mutants
from tests.faults import KINDS, MUTANTS, REQUIRED_KINDS, Mutant, StaleFault, page, runner, trees

ROOT = Path(__file__).resolve().parents[1]
LEAST = 30
AREAS = ("hia_kernels/ops", "hia_kernels/core", "csrc", "python/hia", "bench")


def problem_of(mutant: Mutant) -> str:
    """Say why the fault does not apply to this tree; nothing if it does."""
    try:
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        changed = mutant.applied(text)
        if mutant.file.endswith(".py"):
            compile(changed, mutant.file, "exec")
    except (OSError, StaleFault, SyntaxError) as error:
        return str(error)
    before, after = text.splitlines(), changed.splitlines()
    if len(before) != len(after) or sum(one != other for one, other in zip(before, after, strict=True)) != 1:
        return "a fault stays within one line"
    return "" if mutant.native == mutant.file.startswith("csrc/") else "a fault in csrc/ is native, and no other"


def test_every_fault_applies():
    problems = [f"{mutant.name}: {problem}" for mutant in MUTANTS if (problem := problem_of(mutant))]
    assert not problems, "\n".join(problems)


@cache
def defined_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_the_listed_tests_exist():
    problems = [f"{mutant.name}: names no test that catches it" for mutant in MUTANTS if not mutant.tests]
    for name, test in [(mutant.name, test) for mutant in MUTANTS for test in mutant.tests]:
        file, *names = test.partition("[")[0].split("::")
        missing = set(names) - defined_in(ROOT / file) if (ROOT / file).is_file() else {file}
        problems += [f"{name}: {test} must exist, {sorted(missing)} does not"] if missing else []
    assert not problems, "\n".join(problems)


def test_names_are_unique_and_the_list_is_long_enough():
    repeated = [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1]
    assert not repeated and len(MUTANTS) >= LEAST
    assert not [mutant.name for mutant in MUTANTS if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", mutant.name)]
    same = Counter((mutant.file, mutant.old, mutant.new, mutant.after) for mutant in MUTANTS)
    assert max(same.values()) == 1


def test_every_kind_and_every_area_has_a_fault():
    found = {mutant.kind for mutant in MUTANTS}
    assert found <= set(KINDS), f"unknown kinds: {sorted(found - set(KINDS))}"
    assert set(REQUIRED_KINDS) <= found, f"no fault of kind: {sorted(set(REQUIRED_KINDS) - found)}"
    assert not [area for area in AREAS if not any(mutant.file.startswith(area + "/") for mutant in MUTANTS)]
    files = {Path(mutant.file).name for mutant in MUTANTS if mutant.interpreter}
    assert any("fwd" in name for name in files) and any("bwd" in name for name in files)


def test_every_op_with_kernels_has_a_fault_in_them():
    with_kernels = {path.parent.name for path in (ROOT / "hia_kernels" / "ops").glob("*/triton_*.py")}
    seeded = {Path(mutant.file).parent.name for mutant in MUTANTS if mutant.interpreter}
    assert with_kernels == seeded


def test_the_page_lists_every_fault_and_nothing_else():
    text = (ROOT / page.PAGE).read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \|.*\| (.*?) \|$", text, re.MULTILINE))
    assert sorted(rows) == sorted(mutant.name for mutant in MUTANTS), f"write it again: {page.COMMAND}"
    for mutant in MUTANTS:
        caught_by = re.findall(r"`(.*?)`", rows[mutant.name])
        assert caught_by and all(node.startswith(mutant.tests) for node in caught_by), f"{mutant.name}: {caught_by}"


FILES = {
    "sums.py": """
        import math

        def add(a, b):
            return a + b

        def multiply(a, b):
            return math.floor(a * b)
        """,
    "tests/test_sums.py": """
        import pytest
        from sums import add, multiply

        def test_add():
            assert add(2, 3) == 5

        def test_multiply():
            assert multiply(2, 2) == 4

        @pytest.mark.parametrize("a", [0, 1])
        def test_of_zero(a):
            assert add(a, 0) == a

        @pytest.mark.skip(reason="not here")
        def test_elsewhere():
            assert add(1, 1) == 2

        def test_that_fails_anyway():
            assert add(1, 1) == 3
        """,
}
ADD, MULTIPLY = "tests/test_sums.py::test_add", "tests/test_sums.py::test_multiply"


def fault(name, old, new, *tests, **changes):
    return Mutant(name, "sign", "sums.py", old, new, tests, "as it says", **changes)


CAUGHT = fault("sum-has-the-wrong-sign", "a + b", "a - b", ADD)
UNCAUGHT = fault("product-is-a-sum", "a * b", "a + b", MULTIPLY)
BROKEN_IMPORT = fault("module-is-gone", "import math", "import no_such_module", ADD)
CRASH = fault("sum-raises", "a + b", "a + b.no_such_thing", ADD)
NOT_SEEN = fault("zero-is-neutral-for-both", "a + b", "a - b", "tests/test_sums.py::test_of_zero")
STALE = fault("moved-away", "a / b", "a * b", ADD)
SKIPPED = fault("seen-by-nobody", "a + b", "a - b", "tests/test_sums.py::test_elsewhere")
RED = fault("seen-by-a-red-test", "a + b", "a - b", "tests/test_sums.py::test_that_fails_anyway")


@pytest.fixture
def project(tmp_path):
    """A repository of two functions, one of them tested with numbers that hide what is wrong."""
    root = tmp_path / "project"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text), encoding="utf-8")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


def content_of(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and ".git" not in path.parts}


def test_a_caught_fault_and_the_tree_as_it_was(project, capsys):
    before = content_of(project)
    assert mutants.main(["--jobs", "1"], project, [CAUGHT]) == 0
    assert content_of(project) == before
    printed = capsys.readouterr().out
    assert f"sum-has-the-wrong-sign: caught by {ADD}" in printed and "1 of 1 faults caught" in printed


def test_what_is_not_caught_and_why(project, capsys):
    """A broken import and a crash end the tests too, and say nothing about them. Each fault is gone before the next."""
    assert mutants.main(["--jobs", "2"], project, [BROKEN_IMPORT, UNCAUGHT, CRASH, NOT_SEEN, CAUGHT]) == 1
    printed = capsys.readouterr().out
    assert "1 of 5 faults caught" in printed
    problems = dict(re.findall(r"^NOT CAUGHT  (\S+) \(sums.py\): (.*)$", printed, re.MULTILINE))
    assert problems["product-is-a-sum"] == problems["zero-is-neutral-for-both"] == "its tests pass"
    assert problems["module-is-gone"].startswith("not a test but what surrounds it failed: tests/test_sums.py")
    assert problems["sum-raises"].startswith(f"a test failed, but not by an assertion: {ADD}: AttributeError: ")
    assert set(problems) == {"product-is-a-sum", "zero-is-neutral-for-both", "module-is-gone", "sum-raises"}


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (STALE, "moved-away: sums.py must hold 'a / b' exactly once, got 0 times; move the fault with the code"),
        (fault("twice", "def ", "def _", ADD), "twice: sums.py must hold 'def ' exactly once, got 2 times"),
        (fault("behind", "import", "from", ADD, after="def add"), "must hold 'import' behind 'def add', got none"),
        (SKIPPED, "seen-by-nobody's test tests/test_sums.py::test_elsewhere must run and pass without the fault"),
        (RED, "must pass without a fault, got tests/test_sums.py::test_that_fails_anyway: assert 2 == 3"),
    ],
    ids=["stale", "twice", "behind", "skipped", "red"],
)
def test_where_nothing_can_be_said(mutant, message, project, capsys):
    assert mutants.main([], project, [mutant]) == 2
    assert message in capsys.readouterr().err


def test_the_first_place_behind_another_is_changed():
    text = "a = 1\ndef f():\n    a = 1\n    a = 1\n"
    assert fault("one", "a = 1", "a = 2", after="def f").applied(text) == "a = 1\ndef f():\n    a = 2\n    a = 1\n"
    with pytest.raises(StaleFault, match="exactly once, got 3 times"):
        fault("one", "a = 1", "a = 2").applied(text)


def test_a_kept_copy_holds_the_fault(project, capsys):
    assert mutants.main(["--keep"], project, [CAUGHT]) == 0
    folder = Path(re.search(r"copies, which stay: (.*)", capsys.readouterr().out).group(1))
    try:
        assert "a - b" in (folder / "tree-0" / "sums.py").read_text(encoding="utf-8")
    finally:
        shutil.rmtree(folder)


def test_ctrl_c_leaves_nothing(project, monkeypatch, capsys):
    """Neither a copy stays nor a process that works in it."""
    copies = []
    monkeypatch.setattr(trees.Tree, "check_sources", lambda tree: copies.append(tree))

    def interrupted(threads):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_join", interrupted)
    before = content_of(project)
    assert mutants.main([], project, [CAUGHT]) == 130
    assert "the working tree is as it was" in capsys.readouterr().err
    (copy,) = copies
    assert not copy.folder.exists() and content_of(project) == before
    with pytest.raises(trees.TreeError, match="interrupted"):
        copy.pytest([ADD], interpreter=False, first_failure=True)


@pytest.mark.parametrize(
    ("message", "is_one"),
    [
        ("assert 4 == 5", True),
        ("AssertionError: out: rel-RMS 1.00e-02 > 1.00e-06", True),
        ("AssertionError", True),
        ("Failed: DID NOT RAISE <class 'ValueError'>", True),
        ("torch.autograd.gradcheck.GradcheckError: Jacobian mismatch for output 0", True),
        ("torch.testing._internal.optests.generate_tests.OpCheckError: opcheck(op, ...): failed", True),
        ("ModuleNotFoundError: No module named 'assert '", False),
        ("RuntimeError: AssertionError: in another process", False),
        ("", False),
    ],
)
def test_what_is_an_assertion(message, is_one):
    assert trees.is_assertion(message) is is_one


def test_flags(capsys):
    with pytest.raises(SystemExit):
        mutants.main(["--only", "sum-has-the-wrong-sing"], ROOT, [CAUGHT])
    assert "--only: must name a fault, got 'sum-has-the-wrong-sing'; did you mean sum-has-the-wrong-sign?" in (
        capsys.readouterr().err
    )
    for arguments in (["--jobs", "0"], ["--write", "--only", CAUGHT.name]):
        with pytest.raises(SystemExit):
            mutants.main(arguments, ROOT, [CAUGHT])
    assert "--jobs: must be at least 1, got 0" in (message := capsys.readouterr().err)
    assert "--write: must be of all faults, got --only too" in message
    assert mutants.main(["--list"], ROOT, [CAUGHT]) == 0
    assert f"sum-has-the-wrong-sign\n  sign: as it says\n  sums.py\n  {ADD}" in capsys.readouterr().out


def test_a_page_is_by_area():
    verdicts = [runner.Verdict(one, (ADD,), "", 1.0) for one in (MUTANTS[0], CAUGHT)]
    text = page.page(verdicts, "a command, a commit, a machine", 90.0)
    assert "a command, a commit, a machine: 2 of 2 caught in 1.5 minutes." in text
    assert "## Triton kernels" in text and "## References, CPU paths and what the ops share" in text
    assert f"| `{CAUGHT.name}` | sign | `sums.py` | as it says | `{ADD}` |" in text
