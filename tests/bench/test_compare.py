"""``make bench-compare``: verdicts, and two revisions of a small repository measured for real."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

from bench import workloads
from bench.compare import regression
from bench.compare import run as compare
from bench.compare.run import Row

STUB = '''"""Stands in for the package: each op sleeps."""
import time
{ops}
'''


def row(*medians: float) -> Row:
    return Row("stem", [[1.0, 1.0, 1.0] for _ in medians], [[m * 0.9, m, m * 3] for m in medians])


@pytest.mark.parametrize(
    ("medians", "verdict"),
    [
        ((1.05,), "same"),
        ((1.2,), "slower"),
        ((0.8,), "faster"),
        ((1.09, 1.3, 1.09), "same"),
        ((1.3, 1.02, 1.05), "same"),
        ((1.2, 0.7, 0.7), "noisy"),
        ((0.7, 1.2, 1.3), "noisy"),
        ((1.3, 0.98, 1.2), "noisy"),
        ((1.3, 1.2, 1.05), "slower"),
        ((1.3, 1.2, 1.15), "slower"),
        ((0.7, 0.8, 0.95), "faster"),
    ],
    ids=str,
)
def test_median_of_the_pairs_decides_and_none_may_contradict(medians, verdict):
    assert row(*medians).verdict(0.10) == verdict


@pytest.mark.parametrize(
    ("medians", "verdict"),
    [([1.2, 0.7, 0.7], "noisy"), ([1.2, 1.0, 1.3], "noisy"), ([1.2, 1.01, 1.3], "slower"), ([1.0], "same")],
    ids=str,
)
def test_what_moved_is_measured_three_times(medians, verdict, monkeypatch):
    """A second pair that finds nothing doesn't end it: the median of two would be their mean."""
    left = list(medians)

    class Closed:
        base = now = None

        def close(self):
            pass

    def measure(found, *_):
        found.base_ms.append([1.0] * 3)
        found.now_ms.append([left.pop(0)] * 3)

    monkeypatch.setattr(compare, "measure", measure)
    (found,) = compare.compare(["stem"], Closed, 3, 0.10)
    assert found.verdict(0.10) == verdict
    assert not left


def test_what_cannot_run_is_not_compared():
    bad = Row("stem", [[]], [[]], problem="BASE can't run it: AttributeError: no stem")
    assert bad.verdict(0.10) == "not compared"
    assert "BASE can't run it" in compare.line_of(bad, 0.10)


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.invalid", *arguments]
    subprocess.run(command, check=True, capture_output=True)


def write_stub(folder, seconds: dict[str, float]) -> None:
    package = folder / "hia_kernels"
    package.mkdir(parents=True, exist_ok=True)
    ops = "\n".join(f"def {op}(**inputs):\n    time.sleep({pause})" for op, pause in seconds.items())
    (package / "__init__.py").write_text(STUB.format(ops=ops))


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repo"
    write_stub(folder, {"stem": 0.02, "norm_linear": 0.01})
    git(folder.parent, "init", "-q", str(folder))
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "base")
    return folder


def worktrees(folder) -> int:
    listed = subprocess.run(["git", "-C", str(folder), "worktree", "list"], capture_output=True, text=True, check=True)
    return len(listed.stdout.splitlines())


def test_a_regression_fails_and_the_worktree_goes(repository, capsys, monkeypatch):
    monkeypatch.setattr(compare, "PAIRS", 2)
    write_stub(repository, {"stem": 0.04, "norm_linear": 0.01, "inject_rows": 0.01})
    arguments = ["HEAD", "--rounds", "3", "--case", "stem", "norm_linear", "inject_rows"]
    assert compare.main(arguments, root=repository) == 1
    said = capsys.readouterr().out
    assert "again, in new processes: stem\n" in said
    verdicts = {line.split()[0]: line for line in said.splitlines() if line.startswith(("stem", "norm", "inject"))}
    assert verdicts["stem"].endswith("slower")
    assert verdicts["norm_linear"].endswith("same")
    assert "not compared: BASE can't run it: AttributeError" in verdicts["inject_rows"]
    assert "1 slower, 0 faster, 1 same, 0 noisy, 1 not compared" in said
    assert worktrees(repository) == 1


def test_an_unchanged_tree_passes(repository):
    assert compare.main(["HEAD", "--rounds", "3", "--case", "norm_linear"], root=repository) == 0


def test_unknown_revision(repository, capsys):
    assert compare.main(["no-such-rev"], root=repository) == 2
    assert "BASE: must be a revision of this repository, got 'no-such-rev'" in capsys.readouterr().err


def test_unknown_case(capsys):
    with pytest.raises(SystemExit):
        compare.parse(["HEAD", "--case", "stm"])
    assert re.search(r"--case: must be among .*stem, .*, got 'stm'; did you mean stem\?", capsys.readouterr().err)


def test_help_says_the_rule(capsys):
    with pytest.raises(SystemExit):
        compare.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Beyond it, 2 more pairs are run, and the median of all 3 decides" in said
    assert "noisy, if it is either and some pair points the other way" in said


def test_a_worker_of_another_checkout_is_refused(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(RuntimeError, match="a worker must use .*elsewhere"):
        compare.Worker(compare.WORKER, tmp_path / "inputs.pt", elsewhere, "BASE")


@pytest.mark.parametrize("case", regression.cases())
def test_the_small_set_computes_something(case):
    result = regression.make_call(case)()
    tensors = result if isinstance(result, tuple) else (result,)
    assert tensors
    for tensor in tensors:
        assert tensor.isfinite().all()
        assert tensor.any(), "a benchmark of zeros measures nothing"


def test_the_small_set_has_every_op():
    found = regression.cases()
    assert set(workloads.ops()) | {"encode", "second_question"} <= set(found) and len(set(found)) == len(found)


def test_calls_can_be_repeated():
    """What writes in place must not go on from where the call before left it."""
    call = regression.make_call("second_question")
    assert torch.equal(call(), call())


def test_composites_of_another_checkout_are_refused(tmp_path, monkeypatch):
    import hia

    monkeypatch.setattr(hia, "__file__", str(tmp_path / "python" / "hia" / "__init__.py"))
    with pytest.raises(RuntimeError, match="bench.compare.worker: hia must come from .*, got .*__init__.py"):
        regression.make_call("encode")


def test_the_small_set_is_no_part_of_make_test():
    collected = (compare.REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert 'testpaths = ["tests"]' in collected
    assert (compare.REPOSITORY / "bench" / "compare" / "test_regression.py").exists()
