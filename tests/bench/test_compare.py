"""``make bench-compare``: verdicts, and two revisions of a small repository measured for real."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import torch

from bench import workloads
from bench.__main__ import main as bench
from bench.compare import regression, worker
from bench.compare import run as compare
from bench.compare.rows import Row
from bench.records.environment import REPOSITORY

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


def test_all_numbers_of_a_line_are_the_deciding_pairs():
    """Not the ratio of one pair beside the times of another, which a process's place in memory changes."""
    found = Row(
        "stem",
        base_ms=[[1.5, 1.5, 1.5], [2.8, 2.8, 2.8], [1.5, 1.6, 1.5]],
        now_ms=[[1.8, 1.8, 1.8], [2.75, 2.75, 2.75], [2.8, 2.9, 2.7]],
    )
    assert [round(median, 3) for median in found.medians] == [1.2, 0.982, 1.812] and found.deciding == 0
    line = found.line(0.10).split()
    assert line[:4] == ["stem", "1.5000", "1.8000", "1.200"] and line[-3:] == ["1.200", "0.982", "1.812"]
    assert float(line[2]) / float(line[1]) == pytest.approx(float(line[3]), rel=1e-3)


@pytest.mark.parametrize(
    ("base", "now", "times"),
    [
        ([375.0, 300.0, 620.0], [368.0, 607.0, 608.0], ["375.0000", "368.0000"]),
        ([1.0, 4.0], [2.0, 2.0], ["4.0000", "2.0000"]),
    ],
    ids=["noise", "even"],
)
def test_times_and_ratio_are_of_one_round(base, now, times):
    """The median of each column by itself would be 375 and 607 beside a ratio of 0.981."""
    found = Row("stem", [base], [now]).line(0.10).split()
    assert found[1:3] == times
    assert float(found[2]) / float(found[1]) == pytest.approx(float(found[3]), abs=5e-4)


def test_what_cannot_run_is_not_compared():
    bad = Row("stem", [[]], [[]], problem="BASE can't run it: AttributeError: no stem")
    assert bad.verdict(0.10) == "not compared"
    assert "BASE can't run it" in bad.line(0.10) and bad.to_dict(0.10)["ratio"] is None


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


def test_a_regression_fails_and_the_worktree_goes(repository, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "PAIRS", 2)
    write_stub(repository, {"stem": 0.04, "norm_linear": 0.01, "inject_rows": 0.01})
    cases = ["stem", "norm_linear", "inject_rows"]
    assert compare.run("HEAD", cases, rounds=3, threshold=0.10, root=repository, out=tmp_path) == 1
    said = capsys.readouterr().out
    assert "again, in new processes: stem\n" in said
    verdicts = {line.split()[0]: line for line in said.splitlines() if line.startswith(("stem", "norm", "inject"))}
    assert verdicts["stem"].split()[8] == "slower" and len(verdicts["stem"].split()) == 9 + 2
    assert verdicts["norm_linear"].split()[8] == "same"
    written = {one["case"]: one for one in json.loads((tmp_path / "compare.json").read_text())["rows"]}
    assert written["stem"]["verdict"] == "slower" and len(written["stem"]["now_ms"]) == 2
    assert "not compared: BASE can't run it: AttributeError" in verdicts["inject_rows"]
    assert "1 slower, 0 faster, 1 same, 0 noisy, 1 not compared" in said
    assert worktrees(repository) == 1


def test_an_unchanged_tree_passes(repository):
    assert compare.run("HEAD", ["norm_linear"], rounds=3, threshold=0.10, root=repository) == 0


def test_unknown_revision(repository, capsys):
    assert compare.run("no-such-rev", ["stem"], rounds=3, threshold=0.10, root=repository) == 2
    assert "BASE: must be a revision of this repository, got 'no-such-rev'" in capsys.readouterr().err


def test_unknown_case(capsys):
    assert bench(["compare", "HEAD", "--case", "linear", "stm"]) == 2
    assert re.search(r"--case: must be among .*stem, .*, got 'stm'; did you mean stem", capsys.readouterr().err)
    assert bench(["compare", "HEAD", "--rounds", "1"]) == 2
    assert "--rounds: must be at least 2, got 1" in capsys.readouterr().err
    assert bench(["compare", "HEAD", "--threshold", "0"]) == 2
    assert "--threshold: must be more than 0, got 0" in capsys.readouterr().err


def test_help_says_the_rule(capsys):
    assert bench(["compare", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Beyond it, two more pairs are run, and the pair with the median of all three decides" in said
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
    """A call that writes in place must not go on from where the call before left it."""
    call = regression.make_call("second_question")
    assert torch.equal(call(), call())


def test_composites_of_another_checkout_are_refused(tmp_path, monkeypatch):
    import hia

    monkeypatch.setattr(hia, "__file__", str(tmp_path / "python" / "hia" / "__init__.py"))
    with pytest.raises(RuntimeError, match="bench compare: hia must come from .*, got .*__init__.py"):
        regression.make_call("encode")


def test_the_small_set_is_no_part_of_make_test():
    collected = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert 'testpaths = ["tests"]' in collected
    assert (REPOSITORY / "bench" / "compare" / "test_regression.py").exists()


def test_a_base_from_before_the_folders_is_served(tmp_path, monkeypatch):
    """``hia.adapter`` of older revisions, though the installed package would offer its ``hia.layers.adapter``."""
    import hia

    monkeypatch.setattr(worker.importlib, "import_module", lambda name: name)
    assert worker._part("adapter") == "hia.layers.adapter"
    monkeypatch.setattr(hia, "__file__", str(tmp_path / "hia" / "__init__.py"))
    assert worker._part("adapter") == "hia.adapter"
