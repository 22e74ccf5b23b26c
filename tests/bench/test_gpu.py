"""``make gpu``'s order, deadlines and degrading, with fake devices and steps of no consequence."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import subprocess
import sys
import time

import pytest

from bench.__main__ import main as bench
from bench.cli import BadOption
from bench.gpu import available, plan, steps, tables
from bench.gpu import run as gpu
from bench.gpu.state import State, identity_of
from bench.gpu.steps import Done, Step
from bench.records import files, resume
from bench.records.environment import REPOSITORY
from bench.records.record import Measurement, write_records

FAKE = ["NVIDIA Fake 9000"]
DEFAULTS = {"out": None, "record": False, "seconds": 540.0, "only": (), "listing": False}


def nothing_missing(_packages):
    return []


IDENTITY = {"device": FAKE[0], "commit": "0123456789", "versions": {"torch": "2"}}


def run_all(steps, folder, seconds=60, lacking=nothing_missing, identity=None):
    """Run steps in a folder; return how each went."""
    results = []
    gpu.run_all(steps, State.read(folder, identity, fresh=False), seconds, results, lacking=lacking)
    return results


def run_step(step, seconds, log):
    return steps.run_step(step, seconds, log, steps.child_environment())


def test_order_and_commands(tmp_path):
    found = plan.plan("cuda", FAKE, tmp_path, None, "sm_90")
    order = ["info", "compile", "smoke", "targets", "profile", "tune", "tests", "table3", "end-to-end"]
    assert [step.name for step in found] == [*order, "ops", "compiled", "build"]
    commands = {step.name: " ".join(step.command) for step in found}
    assert commands["build"] == "setup.py build_ext --inplace"
    passed = f"-p tests.device_guard -p tests.going_on --passed {tmp_path / 'tests_passed.txt'} -n auto"
    assert "-m gpu" in commands["tests"] and passed in commands["tests"]
    assert "launches --target sm_90 --fresh" in commands["compile"], (
        "what tests and benchmarks launch is compiled ahead"
    )
    assert plan.plan("cuda", FAKE, tmp_path, None)[1].skip == "launches are recorded for no GPU of this kind"
    assert commands["targets"].endswith("--add --resume --no-compile --minutes {minutes}")
    assert "--add --resume --compiled --compile-minutes 1 --minutes {minutes}" in commands["compiled"]
    for name in ("smoke", "ops", "end-to-end", "table3"):
        assert f"-m bench {name} --device cuda --out {tmp_path} --resume" in commands[name]
    assert f"profile --furthest 3 --device cuda --out {tmp_path}" in commands["profile"]
    assert f"tune --out {tmp_path / 'tuned.json'} --resume" in commands["tune"]
    fresh = plan.plan("cuda", FAKE, tmp_path, None, "sm_90", fresh=True)
    assert not any("--resume" in step.command for step in fresh), "what is there is measured anew"
    assert not any("pip" in command for command in commands.values()), "nothing is installed"


def test_without_a_device():
    with pytest.raises(BadOption, match="--device: cuda needs a CUDA device that torch can see, got none"):
        gpu.run("cuda", devices=[], **DEFAULTS)


@pytest.mark.parametrize("record", [False, True])
def test_fake_device_names_the_folder(record, capsys):
    """Only a record goes where git looks."""
    assert gpu.run("cuda", devices=FAKE, **{**DEFAULTS, "listing": True, "record": record}) == 0
    folder = files.RESULTS if record else files.OUT
    assert f"--out {folder / 'nvidia-fake-9000'} " in capsys.readouterr().out


def test_a_try_is_no_record(capsys):
    assert bench(["gpu", "--device", "cpu", "--list", "--record"]) == 2
    assert "--record: must not be given with --device cpu" in capsys.readouterr().err


def test_unknown_step(capsys):
    assert bench(["gpu", "--list", "--device", "cpu", "--only", "target"]) == 2
    error = capsys.readouterr().err
    assert "--only: must be among info, compile, smoke" in error and "got 'target'; did you mean targets" in error


@pytest.mark.parametrize(
    ("nvcc", "sources", "reason"),
    [
        ("/usr/bin/nvcc", [], "csrc/ holds no .cpp or .cu source"),
        (None, ["csrc/a.cu"], "no nvcc"),
        ("/usr/bin/nvcc", ["csrc/a.cu"], None),
    ],
)
def test_build_is_left_out_aloud(nvcc, sources, reason):
    found = available.build_skipped(nvcc, sources)
    assert found is None if reason is None else reason in found


def test_missing_packages_leave_a_step_out(tmp_path, capsys):
    steps = [Step("tests", ("-c", "raise SystemExit(1)"), 5, needs=("pytest",)), Step("fine", ("-c", ""), 5)]
    results = run_all(steps, tmp_path, lacking=lambda packages: [p for p in packages if p == "pytest"])
    assert [done.status for done in results] == ["left out", "ok"]
    assert results[0].detail == "not installed here: pytest"
    assert "tests: left out, not installed here: pytest" in capsys.readouterr().out


def test_what_a_step_can_do_without_is_said(tmp_path, capsys):
    step = Step("table3", ("-c", ""), 5, without=("matplotlib",))
    run_all([step], tmp_path, lacking=lambda packages: list(packages))
    assert "table3: goes on without matplotlib" in capsys.readouterr().out


def test_a_failure_does_not_stop_the_rest(tmp_path, capsys):
    steps = [Step("bad", ("-c", "print('the cause'); raise SystemExit(3)"), 5), Step("good", ("-c", ""), 5)]
    results = run_all(steps, tmp_path)
    assert [(done.status, done.detail) for done in results] == [("failed", "exit code 3"), ("ok", "")]
    assert "the cause" in capsys.readouterr().out
    assert [entry["name"] for entry in json.loads((tmp_path / "gpu.json").read_text())["steps"]] == ["bad", "good"]


def test_deadline_interrupts_first_and_kills_what_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "GRACE_S", 1.0)
    polite = "import time\ntry:\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  print('written')"
    stubborn = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    started = time.monotonic()
    for name, script in (("polite", polite), ("stubborn", stubborn)):
        done = run_step(Step(name, ("-c", script), 4), 4.0, tmp_path / f"{name}.log")
        assert done.status == "unfinished" and done.is_left_to_do
    assert time.monotonic() - started < 30
    assert "written" in (tmp_path / "polite.log").read_text()


def test_no_step_starts_when_the_time_is_up(tmp_path):
    (done,) = run_all([Step("late", ("-c", ""), 5)], tmp_path, 1.0)
    assert (done.status, done.detail) == ("not begun", "no time left of 1 s")
    assert done.is_left_to_do


def test_what_was_not_reached_is_no_success(tmp_path):
    """A command's own word that its time was over counts as much as a deadline."""
    script = f"raise SystemExit({resume.UNFINISHED})"
    (done,) = run_all([Step("cut", ("-c", script), 5)], tmp_path)
    assert (done.status, done.is_left_to_do) == ("unfinished", True)


@pytest.mark.parametrize(
    ("statuses", "code", "said"),
    [
        (["ok", "left out"], 0, ""),
        (["ok", "failed"], 1, ""),
        (["ok", "unfinished", "not begun"], 1, "not finished: b, c; run it again: it goes on"),
    ],
)
def test_exit_code(statuses, code, said, capsys):
    results = [Done(name, status, "", 1.0) for name, status in zip("abc", statuses, strict=False)]
    assert gpu._ended(results, interrupted=False) == code
    assert capsys.readouterr().out.strip() == said


def counting(tmp_path, name, code=0):
    """Make a step that counts its runs in a file."""
    return Step(name, ("-c", f"open({str(tmp_path / name)!r}, 'a').write('x'); raise SystemExit({code})"), 30)


def runs_of(tmp_path, name):
    return len((tmp_path / name).read_text())


def test_a_rerun_goes_on_where_the_first_ended(tmp_path, capsys):
    fine, bad = counting(tmp_path, "fine"), counting(tmp_path, "bad", 3)
    cut, again = counting(tmp_path, "cut", resume.UNFINISHED), counting(tmp_path, "again")
    steps = [fine, bad, cut, dataclasses.replace(again, again=True)]
    for _ in range(2):
        results = run_all(steps, tmp_path, identity=IDENTITY)
        assert [done.status for done in results] == ["ok", "failed", "unfinished", "ok"]
    assert [runs_of(tmp_path, name) for name in ("fine", "bad", "cut", "again")] == [1, 2, 2, 2]
    assert "fine: ok, done before, " in capsys.readouterr().out


@pytest.mark.parametrize("changed", ["device", "commit", "versions"])
def test_steps_of_something_else_do_not_count(changed, tmp_path):
    run_all([counting(tmp_path, "fine")], tmp_path, identity=IDENTITY)
    state = State.read(tmp_path, {**IDENTITY, changed: "another"}, fresh=False)
    assert state.steps == {} and "earlier steps are of another commit, device or version" in state.note
    assert State.read(tmp_path, IDENTITY, fresh=False).steps["fine"].status == "ok"
    assert State.read(tmp_path, IDENTITY, fresh=True).steps == {}


def test_changed_files_have_no_identity(tmp_path, monkeypatch):
    """Nobody can tell what was run, so nothing is taken over."""
    facts = {"commit": "0123456789", "dirty": True}
    monkeypatch.setattr("bench.records.environment.revision", lambda: facts)
    assert identity_of("made up") is None
    facts["dirty"] = False
    assert identity_of("made up")["commit"] == "0123456789"
    run_all([counting(tmp_path, "fine")], tmp_path, identity=None)
    assert "nobody knows what was run" in State.read(tmp_path, None, fresh=False).note


def test_a_damaged_file_starts_again(tmp_path):
    (tmp_path / "gpu.json").write_text("[")
    state = State.read(tmp_path, IDENTITY, fresh=False)
    assert state.steps == {} and "gpu.json can't be read" in state.note


def test_everything_fits_into_nine_minutes(tmp_path):
    """Even if every step takes all it may and has to be killed, there is time for the tables."""
    now = 15.0  # torch's import
    for step in plan.plan("cuda", FAKE, tmp_path, None, "sm_90"):
        left = plan.TOTAL_S - now - gpu.RESERVE_S
        if left >= min(gpu.LEAST_S, step.at_most_s):
            now += min(step.at_most_s, left) + steps.GRACE_S + 5
    assert now < plan.TOTAL_S - 10


def test_the_clock_starts_before_torch_is_imported():
    script = "import sys, bench.__main__, bench.gpu.run; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=steps.child_environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_a_trial_is_no_record_of_the_device(capsys):
    assert bench(["gpu", "--device", "cpu", "--list"]) == 0
    printed = capsys.readouterr().out
    assert f"--out {files.OUT / 'trial'} " in printed and "bench/results" not in printed


FAILING = """
import time, sys
print("..F.s")
sys.stdout.flush()
try:
    time.sleep(60)
except KeyboardInterrupt:
    print(%r)
"""


@pytest.mark.parametrize("last", ["nothing", "===== 1 failed, 3 passed in 2.31s ====="], ids=["killed", "summary"])
def test_tests_that_had_failed_at_the_deadline_are_a_failure(last, tmp_path):
    step = Step("tests", ("-c", FAILING % last, "pytest"), 3)
    done = run_step(step, 3.0, tmp_path / "log")
    assert (done.status, done.detail) == ("failed", "1 tests had failed when it was stopped after 3 s")


@pytest.mark.parametrize(
    ("log", "failures"),
    [
        ("..F.s  [ 50%]\nEx..F", 3),
        ("....\nE   assert 1 == 2\nFAILED tests/a.py", 0),
        ("..F\n= FAILURES =\nE\n== 2 failed, 1 error, 7 passed in 0.31s ==", 3),
        ("....  [100%]\n4 passed, 2 skipped in 60.31s (0:01:00)", 0),
    ],
    ids=["letters", "none", "summary", "passed"],
)
def test_failures_are_read_from_the_log(log, failures, tmp_path):
    (tmp_path / "log").write_text(log)
    assert steps.failed_tests(tmp_path / "log") == failures


def test_test_files_without_their_packages_are_left_out(tmp_path):
    """An absent package in one file must not fail the collection of all."""
    ops = tmp_path / "tests" / "ops"
    ops.mkdir(parents=True)
    (tmp_path / "tests" / "hia").mkdir()
    files = {
        "harness.py": "from hypothesis import given",
        "test_b.py": "import torch",
        "test_c.py": "from . import harness",
        "test_a.py": "import torch, json\nfrom tests.ops.harness import x",
        "test_d.py": "def f():\n    import hypothesis",
        "test_e.py": "from hia import config\nimport hypothesis.strategies as st",
    }
    for name, text in files.items():
        (ops / name).write_text(text)
    found = available.unimportable_tests(tmp_path, lambda packages: [name for name in packages if name == "hypothesis"])
    assert found == ["tests/ops/test_a.py", "tests/ops/test_c.py", "tests/ops/test_e.py"]
    assert available.unimportable_tests(tmp_path, nothing_missing) == []
    asked = []
    available.unimportable_tests(tmp_path, lambda packages: asked.extend(packages) or [])
    assert set(asked) == {"torch", "hypothesis"}, "neither ours nor the standard library's"


def test_steps_are_told_their_time(tmp_path):
    step = Step("told", ("-c", "import sys; print(sys.argv[1:])", steps.SECONDS, steps.MINUTES), 75)
    assert run_step(step, 75.0, tmp_path / "told.log").status == "ok"
    assert (tmp_path / "told.log").read_text().strip() == "['60', '1.00']"


def test_sources_of_the_checkout_come_first(tmp_path):
    script = "from importlib.util import find_spec as f; print(f('hia').origin, f('hia_kernels').origin)"
    run_step(Step("where", ("-c", script), 60), 60, tmp_path / "log")
    where = (tmp_path / "log").read_text()
    assert str(REPOSITORY / "python" / "hia") in where
    assert str(REPOSITORY / "hia_kernels") in where


def test_ends_with_the_rows_furthest_from_their_floor(tmp_path):
    assert "nothing was measured" in tables.furthest_table(tmp_path)[0]
    environment = {"device": "made up", "command": "python -m bench ops", "commit": "0123456789abcdef"}
    records = [
        Measurement(
            "op",
            "stem",
            f"px{side}",
            provider,
            "forward",
            "bf16",
            "cuda",
            "ok",
            None,
            1.0,
            1.0,
            1.0,
            roofline_ms=share / 100,
            percent_of_roofline=share,
            environment=environment,
        )
        for provider in ("hia", "eager")
        for side, share in zip(range(100, 115), range(5, 95, 6))
    ]
    write_records(tmp_path / "kernels.json", records)
    lines = tables.furthest_table(tmp_path)
    assert lines[0].startswith("the 10 rows of ours")
    assert [line.split()[-1] for line in lines[2:12]] == [f"px{side}" for side in range(100, 110)]
    assert "python -m bench ops" in lines[12]
    assert "0123456789" in lines[12]


def measured(case, date, provider="hia", p50=1.0):
    where = {"device": "made up", "date": date}
    return Measurement(
        "op",
        "stem",
        case,
        provider,
        "forward",
        "bf16",
        "cuda",
        "ok",
        None,
        p50,
        p50,
        p50,
        roofline_ms=0.5,
        percent_of_roofline=50 / p50,
        environment=where,
    )


SINCE = datetime.datetime(2026, 5, 5, 12, 0, 0, 700, tzinfo=datetime.timezone.utc)
BEFORE, AFTER = "2026-05-05T11:59:59+00:00", "2026-05-05T12:00:00+00:00"


def test_the_tables_are_of_one_commit_on_one_device(tmp_path):
    """An earlier run's records count, if they are of the same commit."""
    rows = [measured(name, BEFORE) for name in ("same", "other")]
    facts = {**IDENTITY, "dirty": False}
    rows = [
        dataclasses.replace(row, environment={**row.environment, **facts, "commit": commit})
        for row, commit in zip(rows, (IDENTITY["commit"], "another"), strict=True)
    ]
    write_records(tmp_path / "kernels.json", rows)
    scope = resume.identity({**facts, "versions": {"torch": "2"}})
    assert [row.case for row in tables.records_of(tmp_path / "kernels.json", scope)] == ["same"]


def test_the_tables_are_of_this_run_alone(tmp_path):
    write_records(tmp_path / "kernels.json", [measured("old", BEFORE), measured("new", AFTER)])
    lines = tables.furthest_table(tmp_path, SINCE)
    assert lines[0].startswith("the 1 rows") and lines[2].endswith("new")
    (tmp_path / "kernels.json").write_text("[")
    assert "kernels.json can't be read: " in tables.furthest_table(tmp_path, SINCE)[0]


def test_verdicts_are_of_this_run_alone(tmp_path):
    assert tables.verdict_table(tmp_path, "cuda", SINCE) == ["targets: none was measured"]
    stored = [
        {
            "name": "table3-flops-896",
            "kind": "flops",
            "where": "",
            "target": 0.7,
            "ratio": 0.6,
            "verdict": "met",
            "note": "as stored",
        }
    ]
    rows = [measured("px2048-16bit", AFTER), measured("px2048-16bit", AFTER, "eager_rgb", 4.0)]
    write_records(tmp_path / "targets.json", rows, targets=stored)
    lines = tables.verdict_table(tmp_path, "cuda", SINCE)
    (line,) = [line for line in lines if " stem-16bit " in line]
    assert line.split()[:3] == ["MISSED", "4.00", "5.00"] and line.endswith("hia 1 ms, eager_rgb 4 ms")
    assert any(line.endswith("as stored") for line in lines)
    assert any("1 MISSED" in line and "not measured" in line for line in lines)
    write_records(tmp_path / "targets.json", [measured("px2048-16bit", BEFORE)], targets=stored)
    assert tables.verdict_table(tmp_path, "cuda", SINCE) == ["targets: none was measured"]
    (tmp_path / "targets.json").write_text("[")
    assert "targets.json can't be read" in tables.verdict_table(tmp_path, "cuda", SINCE)[0]


def test_ctrl_c_ends_with_the_tables(tmp_path, monkeypatch, capsys):
    def interrupted(_steps, _state, _seconds, results):
        results.append(steps.Done("info", "ok", "", 1.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run_all", interrupted)
    assert bench(["gpu", "--device", "cpu", "--out", str(tmp_path)]) == 130
    printed = capsys.readouterr().out
    assert "info        ok" in printed and "interrupted: what was measured is kept; run it again" in printed


@pytest.mark.slow
def test_a_trial_on_the_cpu(tmp_path, capsys):
    """The steps for real, as far as a CPU goes: their commands are accepted, their records become the tables."""
    chosen = ["info", "smoke", "targets", "tests", "ops", "compiled"]
    began = time.monotonic()
    code = bench(["gpu", "--device", "cpu", "--out", str(tmp_path), "--seconds", "200", "--only", *chosen])
    printed = capsys.readouterr().out
    assert time.monotonic() - began < 220
    results = {entry["name"]: entry for entry in json.loads((tmp_path / "gpu.json").read_text())["steps"]}
    assert list(results) == chosen and results.pop("compiled")["status"] == "left out"
    late = results["ops"]["status"] == "unfinished"  # the last one; a machine with other work is slow
    assert {entry["status"] for name, entry in results.items() if not (late and name == "ops")} == {"ok"}, printed
    assert code == int(late), printed
    for name in ("smoke.json", "targets.json", "kernels.json", *(f"logs/{step}.log" for step in results)):
        assert (tmp_path / name).stat().st_size > 0
    assert "the targets" in printed and "rows of ours furthest from their roofline" in printed
    assert "met" in printed and "python -m bench ops --device cpu" in printed


def test_interpreter_is_the_running_one(tmp_path):
    steps.run_step(Step("python", ("-c", "import sys; print(sys.executable)"), 9), 9, tmp_path / "log", {})
    assert (tmp_path / "log").read_text().strip() == sys.executable


def test_a_request_to_end_stops_the_step_too(tmp_path):
    """Leave no step behind that would measure beside a rerun: batch systems send SIGTERM."""
    code = (
        "import sys, signal, os; from pathlib import Path; from bench.gpu import steps\n"
        "log = Path(sys.argv[1]); inner = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "with steps.ended_like_ctrl_c():\n"
        "    steps.run_step(steps.Step('s', ('-c', inner), 60), 60, log, steps.child_environment())\n"
    )
    log = tmp_path / "log"
    process = subprocess.Popen([sys.executable, "-c", code, str(log)], env=steps.child_environment())
    end = time.monotonic() + 30
    while time.monotonic() < end and not (log.exists() and log.read_text().strip()):
        time.sleep(0.1)
    inner = int(log.read_text())
    process.terminate()
    process.wait(timeout=30)
    with pytest.raises(ProcessLookupError):
        os.kill(inner, 0)
    assert process.returncode != 0


def test_commands_are_shown_as_they_run(capsys):
    assert gpu.run("cuda", **{**DEFAULTS, "listing": True}, devices=FAKE) == 0
    printed = capsys.readouterr().out
    assert "--minutes 1.75" in printed and "{" not in printed


def test_a_wrong_commit_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("BENCH_COMMIT", "foo")
    assert bench(["gpu", "--device", "cpu", "--only", "info"]) == 2
    assert "BENCH_COMMIT must be a commit's hash, got 'foo'" in capsys.readouterr().err
