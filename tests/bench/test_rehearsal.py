"""``bench gpu --rehearse``: a step reaches its launches, and what would break on a GPU alone breaks it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")

from bench.__main__ import main as bench
from bench.gpu import rehearsal
from bench.gpu.stand_ins import rehearsing
from bench.gpu.steps import Step
from bench.launches.device import TARGETS
from hia_kernels.core import triton_support

pytestmark = pytest.mark.skipif(triton_support.interpreted(), reason="the interpreter's process")
PROFILE = ("-m", "bench", "profile", "stem", "px448", "--device", "cuda", "--out")


def test_a_step_reaches_its_launches(tmp_path):
    walked = rehearsal.walk(Step("profile", (*PROFILE, str(tmp_path)), 60), "sm_90", tmp_path)
    assert walked.problems == ()
    assert int(walked.what.split()[0]) >= 3, "launches of the stem"
    assert (tmp_path / "profiles").exists(), "the command itself ran"
    assert not torch.cuda.is_available(), "the fake device is gone"


def test_what_only_a_gpu_runs_is_walked(tmp_path, monkeypatch):
    """A name that is not there, which no test on a CPU meets, fails the step."""
    monkeypatch.delattr("bench.profile.run.last_backend")
    walked = rehearsal.walk(Step("profile", (*PROFILE, str(tmp_path)), 60), "sm_90", tmp_path)
    assert walked.problems[0].startswith("NameError: name 'last_backend' is not defined (run.py:")
    assert rehearsal.line_of(Step("profile", (), 60), walked).splitlines()[0].split()[:2] == ["profile", "FAILED"]


def test_a_step_that_launches_nothing_fails(tmp_path):
    command = ("-m", "bench", "targets", "--device", "cuda", "--list", "--out", str(tmp_path))
    assert rehearsal.walk(Step("targets", command, 60), "sm_90", tmp_path).problems == ("no kernel was launched",)


def test_every_step_of_the_plan_is_rehearsed_but_the_build(tmp_path):
    steps = rehearsal.steps_of("sm_90", tmp_path)
    assert [step.name for step in steps if step.skip is not None] == ["build"]
    assert len(steps) == 12 and all(str(tmp_path / step.name) in " ".join(step.command) for step in steps[1:11])


def test_whole_numbers_keep_their_values():
    with rehearsing(TARGETS["sm_90"]):
        lengths = torch.tensor([0, 3, 7], dtype=torch.int32).to(torch.device("cuda"), non_blocking=True)
        first, rest = lengths.split([1, 2])
        assert lengths.device.type == "cuda" and lengths.tolist() == [0, 3, 7]
        assert (rest.diff().tolist(), first.item()) == ([4], 0)
        with pytest.raises((NotImplementedError, RuntimeError)):
            torch.ones(3, dtype=torch.float32, device="cuda").tolist()


def test_nothing_but_the_steps_own_folders_goes(tmp_path, capsys):
    """Keep what else is where a rehearsal writes, as records of a real run."""
    for name in ("targets.json", "build/old", "notes/kept"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert rehearsal.run("sm_90", only=["build"], out=tmp_path) == 0
    assert "left out" in capsys.readouterr().out
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"targets.json", "old", "kept"}


def test_it_is_listed_without_a_run(tmp_path, capsys):
    assert bench(["gpu", "--rehearse", "--list", "--out", str(tmp_path)]) == 0
    assert "smoke       python -m bench smoke" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [["--device", "cpu"], ["--fresh"], ["--seconds", "9"], ["--record"]], ids=str)
def test_options_of_a_real_run_are_refused(given, capsys):
    assert bench(["gpu", "--rehearse", *given]) == 2
    assert f"{given[0]}: must not be given with --rehearse" in capsys.readouterr().err
