"""``make gpu``'s order, deadlines and degrading, with fake devices and steps of no consequence."""

from __future__ import annotations

import json
import sys
import time

import pytest

from bench import gpu
from bench.gpu import Step
from bench.measurement import Measurement, write_records

FAKE = ["NVIDIA Fake 9000"]


def nothing_missing(_packages):
    return []


def test_order_and_commands(tmp_path):
    steps = gpu.plan("cuda", FAKE, tmp_path, None)
    assert [step.name for step in steps] == ["info", "build", "tests", "kernels", "end_to_end", "table3"]
    commands = {step.name: " ".join(step.command) for step in steps}
    assert commands["build"] == "setup.py build_ext --inplace"
    assert "-m gpu" in commands["tests"]
    for name in ("kernels", "end_to_end", "table3"):
        assert f"-m bench.{name} --device cuda --out {tmp_path}" in commands[name]
    assert not any("pip" in command for command in commands.values()), "nothing is installed"


def test_without_a_device(capsys):
    assert gpu.main(["--list"], devices=[]) == 2
    assert "--device cuda needs a CUDA device that torch can see, got none" in capsys.readouterr().err


def test_fake_device_names_the_folder(capsys):
    assert gpu.main(["--list"], devices=FAKE) == 0
    assert "bench/results/nvidia-fake-9000" in capsys.readouterr().out


def test_unknown_step(capsys):
    assert gpu.main(["--list", "--device", "cpu", "--only", "kernel"]) == 2
    assert "--only: must be among info, build, tests" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nvcc", "sources", "reason"),
    [("/usr/bin/nvcc", [], "csrc/ holds no .cpp or .cu source"), (None, ["csrc/a.cu"], "no nvcc"),
     ("/usr/bin/nvcc", ["csrc/a.cu"], None)],
)  # fmt: skip
def test_build_is_left_out_aloud(nvcc, sources, reason):
    found = gpu.build_skipped(nvcc, sources)
    assert found is None if reason is None else reason in found


def test_missing_packages_leave_a_step_out(tmp_path, capsys):
    steps = [Step("tests", ("-c", "raise SystemExit(1)"), 5, needs=("pytest",)), Step("fine", ("-c", ""), 5)]
    results = gpu.run_all(steps, tmp_path, 60, lacking=lambda packages: [p for p in packages if p == "pytest"])
    assert [done.status for done in results] == ["left out", "ok"]
    assert results[0].detail == "not installed here: pytest"
    assert "tests: left out, not installed here: pytest" in capsys.readouterr().out


def test_what_a_step_can_do_without_is_said(tmp_path, capsys):
    step = Step("table3", ("-c", ""), 5, without=("matplotlib",))
    gpu.run_all([step], tmp_path, 60, lacking=lambda packages: list(packages))
    assert "table3: goes on without matplotlib" in capsys.readouterr().out


def test_a_failure_does_not_stop_the_rest(tmp_path, capsys):
    steps = [Step("bad", ("-c", "print('the cause'); raise SystemExit(3)"), 5), Step("good", ("-c", ""), 5)]
    results = gpu.run_all(steps, tmp_path, 60, lacking=nothing_missing)
    assert [(done.status, done.detail) for done in results] == [("failed", "exit code 3"), ("ok", "")]
    assert "the cause" in capsys.readouterr().out
    assert [entry["name"] for entry in json.loads((tmp_path / "gpu.json").read_text())] == ["bad", "good"]


def test_deadline_interrupts_first_and_kills_what_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_S", 1.0)
    polite = "import time\ntry:\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  print('written')"
    stubborn = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    started = time.monotonic()
    for name, script in (("polite", polite), ("stubborn", stubborn)):
        done = gpu.run_step(
            Step(name, ("-c", script), 4), 4.0, tmp_path / f"{name}.log", gpu.child_environment(tmp_path)
        )
        assert done.status == "out of time"
    assert time.monotonic() - started < 30
    assert "written" in (tmp_path / "polite.log").read_text()


def test_no_step_starts_when_the_time_is_up(tmp_path):
    results = gpu.run_all([Step("late", ("-c", ""), 5)], tmp_path, 1.0, lacking=nothing_missing)
    assert [(done.status, done.detail) for done in results] == [("left out", "no time left of 1 s")]


def test_time_is_shared_by_what_is_left():
    steps = [Step("a", (), 100), Step("b", (), 300), Step("c", (), 100, skip="not here")]
    assert gpu.share(steps, 0, 1000) == 100
    assert gpu.share(steps, 0, 200) == 50
    assert gpu.share(steps, 1, 200) == 200


def test_steps_are_told_their_time(tmp_path):
    step = Step("told", ("-c", "import sys; print(sys.argv[1:])", gpu.SECONDS, gpu.MINUTES), 75)
    assert gpu.run_step(step, 75.0, tmp_path / "told.log", gpu.child_environment(tmp_path)).status == "ok"
    assert (tmp_path / "told.log").read_text().strip() == "['60', '1.00']"


def test_sources_of_the_checkout_come_first(tmp_path):
    script = "from importlib.util import find_spec as f; print(f('hia').origin, f('hia_kernels').origin)"
    gpu.run_step(Step("where", ("-c", script), 60), 60, tmp_path / "log", gpu.child_environment(tmp_path))
    where = (tmp_path / "log").read_text()
    assert str(gpu.REPOSITORY / "python" / "hia") in where
    assert str(gpu.REPOSITORY / "hia_kernels") in where


def test_ends_with_the_rows_furthest_from_their_floor(tmp_path):
    assert "nothing was measured" in gpu.furthest_table(tmp_path)[0]
    environment = {"device": "made up", "command": "python -m bench.kernels", "commit": "0123456789abcdef"}
    records = [
        Measurement("op", "stem", f"px{side}", provider, "forward", "bf16", "cuda", "ok", None, 1.0, 1.0, 1.0,
                    floor_ms=share / 100, percent_of_floor=share, environment=environment)
        for provider in ("hia", "eager")
        for side, share in zip(range(100, 115), range(5, 95, 6))
    ]  # fmt: skip
    write_records(tmp_path / "kernels.json", records)
    lines = gpu.furthest_table(tmp_path)
    assert lines[0].startswith("the 10 rows of ours")
    assert [line.split()[-1] for line in lines[2:12]] == [f"px{side}" for side in range(100, 110)]
    assert "python -m bench.kernels" in lines[12]
    assert "0123456789" in lines[12]


def test_interpreter_is_the_running_one(tmp_path):
    gpu.run_step(Step("python", ("-c", "import sys; print(sys.executable)"), 9), 9, tmp_path / "log", {})
    assert (tmp_path / "log").read_text().strip() == sys.executable
