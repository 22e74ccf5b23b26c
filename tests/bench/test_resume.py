"""Going on where a run ended: what counts as measured, and that it is not measured again."""

from __future__ import annotations

import dataclasses

import pytest

from bench.gpu.state import State
from bench.ops.collect import left_to_do
from bench.ops.plan import Task
from bench.ops.session import row_of
from bench.records import resume
from bench.records.files import write_json
from bench.smoke import run as smoke
from bench.table3 import run as table3
from bench.table3.rows import Protocol, Report, Row
from bench.tune import run as tune
from bench.tune.search import Tuned
from bench.workloads import workloads

FACTS = {"device": "made up", "commit": "0123456789", "dirty": False, "versions": {"torch": "2.13"}}
WORKLOAD = next(one for one in workloads("row_softmax") if one.name == "tiny")
TASK = Task(WORKLOAD, ("forward", "both"), "fp32", ("hia", "eager"))
TIMES = {"status": "ok", "p20_ms": 1.0, "p50_ms": 1.0, "p80_ms": 1.0}
OVER = {"status": "unavailable", "reason": "not run: --minutes was over before its turn"}
ABSENT = {"status": "unavailable", "reason": "xformers is not installed"}
BROKEN = {"status": "failed", "reason": "beyond the tolerance"}


def row(provider, mode, values, facts=None):
    return dataclasses.replace(row_of(TASK, "cpu", provider, mode, **values), environment=facts or FACTS)


def left(*rows, tasks=(TASK,)):
    return left_to_do(tasks, resume.standing(rows, FACTS), "cpu")


def test_a_mode_that_everybody_has_a_row_in_is_not_measured_again():
    rows = [row("hia", "forward", TIMES), row("eager", "forward", ABSENT)]
    (rest,) = left(*rows)
    assert rest == dataclasses.replace(TASK, modes=("both",))
    assert left(*rows, row("hia", "both", TIMES), row("eager", "both", TIMES)) == []


@pytest.mark.parametrize("values", [OVER, BROKEN], ids=["not reached", "failed"])
def test_what_has_no_result_is_measured_again(values):
    """Everybody it is compared with is measured too: times of different runs are no comparison."""
    (rest,) = left(row("hia", "forward", TIMES), row("eager", "forward", values))
    assert rest == TASK


def test_what_failed_comes_last():
    other = dataclasses.replace(TASK, workload=next(one for one in workloads("inject_rows") if one.name == "tiny"))
    rest = left(row("hia", "forward", BROKEN), tasks=[TASK, other])
    assert [task.workload.op for task in rest] == ["inject_rows", "row_softmax"]


@pytest.mark.parametrize(
    "changed",
    [
        {"device": "another"},
        {"commit": "9876543210"},
        {"versions": {"torch": "2.11"}},
        {"dirty": True},
        {"dirty": None},
    ],
    ids=str,
)
def test_rows_of_something_else_do_not_count(changed):
    assert left(*(row(name, "forward", TIMES, {**FACTS, **changed}) for name in TASK.providers)) == [TASK]


@pytest.mark.parametrize("changed", [{"dirty": True}, {"commit": None}], ids=str)
def test_a_tree_without_a_commit_of_its_own_starts_again(changed):
    facts = {**FACTS, **changed}
    assert resume.identity(facts) is None
    assert resume.standing([row("hia", "forward", TIMES, facts)], facts) == []


def test_a_tuning_knows_what_it_tuned(tmp_path):
    path, tuned = tmp_path / "tuned.json", Tuned({"stem/a": {"num_warps": 4}}, {"stem/a": 1.2}, {"stem/a": {}}, {})
    tune.write(path, tuned, FACTS, tune.Ended("bf16", tuned, ["stem px896"]))
    ended = tune.Ended.read(path, "bf16", FACTS)
    assert (ended.tuned, ended.tasks) == (tuned, ["stem px896"])
    assert tune.Ended.read(path, "fp16", FACTS) == tune.Ended("fp16"), "another dtype's keys are others"
    assert tune.Ended.read(path, "bf16", {**FACTS, "commit": "9876543210"}) == tune.Ended("bf16")


def test_table3_runs_no_row_again(tmp_path):
    measured = Row(448, "hia", "sdpa", 1, 0, 1, "measured", True, 1.0, None, None, False, 1, 1, 1, 1, "13B")
    images = {"kind": "phantoms", "files": ["0.png"]}
    report = Report(Protocol(), measured=[measured], environment=FACTS, images=images | {"tokenizer": "made up"})
    write_json(tmp_path / "table3.json", report.to_dict())
    again = Report(Protocol(), environment=FACTS)
    assert table3.earlier_rows(tmp_path / "table3.json", again, images) == [measured]
    assert (
        table3.earlier_rows(tmp_path / "table3.json", Report(Protocol(card_gb=24.0), environment=FACTS), images) == []
    )
    assert table3.earlier_rows(tmp_path / "none.json", again, images) == []
    assert table3.earlier_rows(tmp_path / "table3.json", again, images | {"files": ["1.png"]}) == []


@pytest.mark.parametrize("content", ['{"env', "[]", '{"environment": 1}', '{"environment": {}, "results": 3}', "null"])
def test_damaged_files_start_again_and_say_so(content, tmp_path, capsys):
    """Begin with nothing where an earlier run's file is cut off, or holds something else."""
    path = tmp_path / "file.json"
    path.write_text(content)
    assert tune.Ended.read(path, "bf16", FACTS) == tune.Ended("bf16")
    assert smoke.earlier(path, FACTS) == []
    assert table3.earlier_rows(path, Report(Protocol(), environment=FACTS), {}) == []
    path.rename(tmp_path / "gpu.json")
    state = State.read(tmp_path, resume.identity(FACTS), fresh=False)
    assert state.steps == {} and "can't be read" in state.note
    assert content.endswith("3}") or "starts again: " in capsys.readouterr().out


def test_an_identity_that_is_no_object_starts_again(tmp_path):
    write_json(tmp_path / "gpu.json", {"identity": "x", "steps": []})
    state = State.read(tmp_path, resume.identity(FACTS), fresh=False)
    assert "identity must be an object, got 'x'" in state.note


def test_a_tuning_writes_over_what_it_could_not_read(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text("{")
    tune.write(path, Tuned(), FACTS, tune.Ended("bf16"))
    assert tune.Ended.read(path, "bf16", FACTS) == tune.Ended("bf16")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"tuned\.json|Expecting"):
        tune.write(path, Tuned(), FACTS)
