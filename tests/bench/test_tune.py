"""``python -m bench tune`` with a fake device, launcher and clock: nothing here needs a GPU."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import types

import pytest
import torch

import hia_kernels
from bench.__main__ import main as bench
from bench.measure.timing import Budget
from bench.measure.worker import DeviceFailed, Inline
from bench.records import files
from bench.tune import race as races
from bench.tune import run as tune_run
from bench.tune import search as tune
from bench.workloads import gpu_workloads
from bench.workloads.conv_norm_act import resnet50_shapes
from hia_kernels.core import backend, tuning
from hia_kernels.ops.conv_norm_act import cpu
from hia_kernels.ops.conv_norm_act.inputs import Shape
from hia_kernels.ops.cross_attention import inputs as attention

DEVICE = torch.device("cuda", 0)
HEURISTIC = {"BLOCK_R": 8, "num_warps": 4, "num_stages": 2}
BUDGET = Budget(0.0, at_least=3)


@pytest.fixture(autouse=True)
def fake_device(monkeypatch):
    monkeypatch.setattr(tuning, "_slug", lambda _index: "fake-9000")
    monkeypatch.setattr(tune, "_listed", lambda op, key: [])
    monkeypatch.delenv("HIA_TUNED", raising=False)


class Launcher:
    """Remembers the configuration of its latest launch."""

    def __init__(self) -> None:
        self.config: dict[str, int] = {}

    def __call__(self) -> None:
        self.config = tuning.pick("fake", "fwd-c64", DEVICE, HEURISTIC)


def tuned_by(seconds_of, problem=lambda: None):
    launcher, tuned = Launcher(), tune.Tuned()
    with tune.recording() as found:
        launcher()
    tuned.seen.update(found)

    def clock(call, _times):
        call()
        return seconds_of(launcher.config)

    checked = (lambda: (launcher(), problem(launcher.config))[1]) if problem.__code__.co_argcount else problem
    tune.tune_key("fake/fwd-c64", tuned, launcher, checked, clock, BUDGET)
    return tuned


def test_keys_are_recorded_with_their_heuristic():
    with tune.recording() as found:
        Launcher()()
    assert found == {"fake/fwd-c64": HEURISTIC}
    assert tuning.pick.__module__ == "hia_kernels.core.tuning"


def test_the_fastest_is_kept_whole():
    tuned = tuned_by(lambda config: 1.0 if config["num_warps"] == 8 else 2.0)
    assert tuned.configurations == {"fake/fwd-c64": {**HEURISTIC, "num_warps": 8}}
    assert tuned.gains == {"fake/fwd-c64": 2.0}


def test_a_gain_within_the_noise_changes_nothing():
    assert tuned_by(lambda config: 0.98 if config["num_warps"] == 8 else 1.0).configurations == {}


def test_wrong_results_and_failures_are_not_timed():
    def problem(config):
        if config["num_warps"] == 2:
            raise RuntimeError("out of resources: shared memory")
        return "dx: rel-RMS" if config["num_warps"] == 8 else None

    tuned = tuned_by(lambda config: 1.0 / config["num_warps"] + config["num_stages"] / 100, problem)
    assert tuned.configurations == {"fake/fwd-c64": {**HEURISTIC, "num_stages": 1}}


def test_at_most_eight_candidates_the_heuristic_first(monkeypatch):
    found = tune.candidates("fake/fwd-c64", HEURISTIC)
    assert found[0] == HEURISTIC and len(found) == 8 and all(config["BLOCK_R"] == 8 for config in found)
    assert tune.candidates("fake/x", {"BLOCK": 256}) == [{"BLOCK": 256}]
    listed = [{"BLOCK_R": 16}, {"BLOCK_X": 1}, {"BLOCK_R": 8}]
    monkeypatch.setattr(tune, "_listed", lambda op, key: listed)
    assert tune.candidates("fake/fwd-c64", HEURISTIC) == [HEURISTIC, {**HEURISTIC, "BLOCK_R": 16}]


def test_launchers_name_candidates(monkeypatch):
    monkeypatch.undo()
    modules = {"hia_kernels.ops.fake": types.SimpleNamespace(__name__="hia_kernels.ops.fake", __path__=[])}
    for name, listed in (
        ("triton_fwd", {"fwd": [{"BLOCK_R": 16}], "rows": [{"BLOCK_R": 1}]}),
        ("triton_bwd", [{"num_warps": 8}]),
        ("library", [{"never": 1}]),
    ):
        modules[f"hia_kernels.ops.fake.{name}"] = types.SimpleNamespace(CANDIDATES=listed)
    monkeypatch.setattr(tune.importlib, "import_module", modules.__getitem__)
    inside = [types.SimpleNamespace(name=name) for name in ("library", "triton_bwd", "triton_fwd")]
    monkeypatch.setattr(tune.pkgutil, "iter_modules", lambda _path: inside)
    assert tune._listed("fake", "fwd-c64") == [{"num_warps": 8}, {"BLOCK_R": 16}]


def test_the_file_is_what_launchers_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    path = tmp_path / "fake-9000.json"
    path.write_text(json.dumps({"configurations": {"fake/old": {"num_warps": 1}, "fake/fwd-c64": {"num_warps": 2}}}))
    tuned = tuned_by(lambda config: 1.0 if config["num_warps"] == 8 else 2.0)
    tune_run.write(path, tuned, {"device": "Fake 9000"})
    assert tuning.stored("fake-9000") == {"fake/fwd-c64": {**HEURISTIC, "num_warps": 8}, "fake/old": {"num_warps": 1}}
    launcher = Launcher()
    launcher()
    assert launcher.config == {**HEURISTIC, "num_warps": 8}
    tuning.stored.cache_clear()


SMALL = Shape((5, 4), 1, (8, 16), residual=True)
SMALL_KEY = "conv_norm_act/k3s1-px32-c8-oc16-float32"


@pytest.fixture
def candidates(monkeypatch):
    """Two that the CPU has."""
    monkeypatch.setitem(races.CANDIDATES, "conv_norm_act", ("reference", "cpu"))


def race(seconds_by_backend):
    tuned = tune.Tuned()

    def clock(call, _times):
        call()
        return seconds_by_backend[hia_kernels.last_backend("conv_norm_act")]

    return races.race(SMALL, torch.float32, tuned, clock, "cpu", BUDGET), tuned


def test_the_faster_backend_is_kept(candidates):
    name, tuned = race({"reference": 2.0, "cpu": 1.0})
    assert name == SMALL_KEY
    assert tuned.backends == {name: "cpu"} and tuned.gains == {name: 2.0}


def test_the_usual_backend_stays_within_the_noise_and_says_so(candidates):
    for seconds in (0.98, 5.0):
        name, tuned = race({"reference": 1.0, "cpu": seconds})
        assert tuned.backends == {SMALL_KEY: "reference"} and tuned.gains == {name: 1.0}


def test_a_backend_that_is_wrong_or_missing_does_not_race(candidates, monkeypatch):
    assert cpu.unavailable_reasons() == []
    original = races.hia_kernels.conv_norm_act

    def wrong(**arguments):
        out = original(**arguments)
        return out + 1 if hia_kernels.last_backend("conv_norm_act") == "cpu" else out

    monkeypatch.setattr(races.hia_kernels, "conv_norm_act", wrong)
    assert race({"reference": 2.0, "cpu": 1.0})[0] is None
    monkeypatch.setattr(races.hia_kernels, "conv_norm_act", original)
    assert race({"reference": 2.0, "cpu": 1.0})[0] == SMALL_KEY
    monkeypatch.setitem(races.CANDIDATES, "conv_norm_act", ("reference", "cudnn"))
    name, tuned = race({"reference": 2.0, "cudnn": 1.0})
    assert name is None and tuned.backends == {}


def test_a_shape_is_measured_once(candidates):
    tuned = tune.Tuned(backends={SMALL_KEY: "cpu"})
    assert races.race(SMALL, torch.float32, tuned, None, "cpu") is None


def test_a_shape_is_tuned_before_its_backends_race(candidates, monkeypatch):
    asked = []

    @contextlib.contextmanager
    def recording():
        yield {"conv_norm_act/a": {"num_warps": 4}, "conv_norm_act/known": {"num_warps": 8}}

    def tune_key(name, tuned, call, problem, clock, budget):
        assert problem() is None and call().shape[-1] == SMALL.channels[1]
        asked.append(name)

    monkeypatch.setattr(races, "recording", recording)
    monkeypatch.setattr(races, "tune_key", tune_key)
    tuned, told = tune.Tuned(seen={"conv_norm_act/known": {"num_warps": 8}}), []
    races.tune_shape(SMALL, torch.float32, tuned, None, "cpu", told.append)
    assert asked == told == ["conv_norm_act/a"] and tuned.seen["conv_norm_act/a"] == {"num_warps": 4}


def test_usual_sizes_are_tuned_first():
    """The first task that meets a key decides about it, and keys of attention don't name a length."""
    names = [one.name for one in tune_run.tasks_of(["cross_attention"])]
    assert names.index("13b-896-2img:extract") < names.index("13b-448-2img:extract")
    shapes = [one for one in tune_run.tasks_of(["conv_norm_act"]) if isinstance(one, Shape)]
    assert shapes[0].size == (224, 224) and len(shapes) > 80


def test_workloads_can_be_named(capsys):
    named = tune_run.tasks_of(["cross_attention", "conv_norm_act"], ["13b-896-2img:*"])
    assert [one.name for one in named] == ["13b-896-2img:extract", "13b-896-2img:inject"]
    assert bench(["tune", "--op", "cross_attention", "--case", "13b-897*"]) == 2
    assert "--case: must be " in capsys.readouterr().err


def test_the_shapes_of_resnet50():
    shapes = resnet50_shapes(224)
    assert len(shapes) == len(set(shapes)) == 24 - 1  # stage 1 enters with its own width
    assert Shape((56, 56), 1, (64, 64), 3, 1) in shapes
    assert Shape((56, 56), 1, (128, 128), 3, 2) in shapes
    assert Shape((14, 14), 1, (1024, 2048), 1, 2) in shapes
    assert Shape((7, 7), 1, (512, 2048), 1, 1, residual=True) in shapes


def test_backends_are_in_the_file_that_the_table_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    path, old = tmp_path / "fake-9000.json", "conv_norm_act/k1s1-px64-c8-oc8-float32"
    path.write_text(json.dumps({"configurations": {}, "backends": {old: "triton"}, "gains": {old: 1.0, "gone": 2.0}}))
    tune_run.write(path, tune.Tuned(backends={SMALL_KEY: "cudnn"}, gains={SMALL_KEY: 1.5}), {})
    assert json.loads(path.read_text())["gains"] == {old: 1.0, SMALL_KEY: 1.5}
    key = SMALL_KEY.removeprefix("conv_norm_act/")
    assert tuning.measured_backend("conv_norm_act", key, DEVICE) == "cudnn"
    assert tuning.measured_backend("conv_norm_act", old.removeprefix("conv_norm_act/"), DEVICE) == "triton"
    tuning.stored.cache_clear()
    tuning.stored_backends.cache_clear()


def test_needs_a_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(["tune"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert bench(["tune", "--op", "stemm"]) == 2
    assert "did you mean stem" in capsys.readouterr().err


class Fake:
    """Runs tasks: finds a key in each, and breaks the device in another that it has not seen."""

    def __init__(self, dtype, tuned):
        self.tuned = copy.deepcopy(tuned)

    def run(self, task, channel):
        channel.say("fake/bad", "fake/bad")
        if "fake/bad" not in self.tuned.seen:
            raise DeviceFailed("the device failed (illegal access)")
        self.tuned.seen[f"fake/{task.name}"] = {"num_warps": 4}
        self.tuned.configurations[f"fake/{task.name}"] = {"num_warps": 8}
        self.tuned.gains[f"fake/{task.name}"] = 1.5
        channel.found(copy.deepcopy(self.tuned))


@pytest.fixture
def run_without_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    monkeypatch.setattr(tune_run.environment, "describe", lambda _device: {"device": "Fake 9000"})
    monkeypatch.setattr(tune_run, "Session", Fake)
    monkeypatch.setattr(tune_run, "Isolated", Inline)
    return [types.SimpleNamespace(op="fake", name=name) for name in ("one", "two")]


def test_a_key_that_breaks_the_device_costs_itself_alone(run_without_gpu, capsys):
    assert tune_run.run(run_without_gpu, "bf16", minutes=None, jobs=1, out=None, record=False) == 0
    printed = capsys.readouterr().out
    assert "failed: fake/bad: the device failed (illegal access)" in printed
    assert "fake/one: {'num_warps': 8}, 1.5 times as fast" in printed and "2 of 3 keys" in printed
    found = json.loads((files.OUT / "fake-9000" / "tuned.json").read_text())
    assert set(found["configurations"]) == {"fake/one", "fake/two"} and not tuning.FOLDER.exists()
    assert "--record writes there" in printed
    assert tune_run.run(run_without_gpu, "bf16", minutes=None, jobs=1, out=None, record=True) == 0
    assert (tuning.FOLDER / "fake-9000.json").exists()


def test_a_task_that_breaks_the_device_is_begun_again(run_without_gpu, monkeypatch, capsys, tmp_path):
    """Fail the step, and don't count the task as ended: a rerun would never come back to it."""
    facts = {"device": "Fake 9000", "commit": "0123456789", "dirty": False, "versions": {}}
    monkeypatch.setattr(tune_run.environment, "describe", lambda _device: facts)
    breaks = [True]

    class Breaking(Fake):
        def run(self, task, channel):
            if task.name == "two" and breaks[0]:
                channel.say("backends at fake two")
                raise DeviceFailed("the device failed (illegal access)")
            super().run(task, channel)

    monkeypatch.setattr(tune_run, "Session", Breaking)
    options = {"minutes": None, "jobs": 1, "out": tmp_path / "tuned.json", "record": False, "resume": True}
    assert tune_run.run(run_without_gpu, "bf16", **options) == 1
    assert json.loads(options["out"].read_text())["ended"]["tasks"] == ["fake one"]
    breaks[0] = False
    assert tune_run.run(run_without_gpu, "bf16", **options) == 0
    assert json.loads(options["out"].read_text())["ended"]["tasks"] == ["fake one", "fake two"]


def test_tuning_ends_when_the_time_is_over(run_without_gpu, capsys):
    assert tune_run.run(run_without_gpu, "bf16", minutes=-1.0, jobs=1, out=None, record=False) == 0
    assert "the time is over, 2 of 2 tasks were not begun" in capsys.readouterr().out


@pytest.mark.parametrize("faster", ["cpu", "reference"])
def test_backends_of_attention_race_forward_and_backward(faster, monkeypatch):
    """Keep the fastest for each pass; what has no deterministic gradients does not race for them."""
    monkeypatch.setitem(races.CANDIDATES, "cross_attention", ("reference", "cudnn", "cpu"))
    workload = next(one for one in gpu_workloads() if one.op == "cross_attention")
    small = dataclasses.replace(workload.shape, lengths_q=(6, 6), lengths_k=(20, 20), heads=2, head_dim=32)
    inputs = attention.make_inputs(small, torch.float32)
    monkeypatch.setattr(races, "make_inputs", lambda *_: inputs)
    served = []

    def clock(call, _times):
        call()
        served.append(hia_kernels.last_backend("cross_attention"))
        return 1.0 if served[-1] == faster else 2.0

    tuned = tune.Tuned()
    sizes = "b2-q8-k32-h2-d32-float32"
    names = [f"cross_attention/{mode}-{sizes}" for mode in ("fwd", "bwd")]
    assert races.race_attention(workload, torch.float32, tuned, clock, "cpu", BUDGET) == names
    assert tuned.backends == dict.fromkeys(names, faster) and set(served) == {"cpu", "reference"}
    assert races.race_attention(workload, torch.float32, tuned, None, "cpu") == []


def test_a_wrong_gradient_does_not_race(monkeypatch):
    monkeypatch.setitem(races.CANDIDATES, "cross_attention", ("reference", "cpu"))
    workload = next(one for one in gpu_workloads() if one.op == "cross_attention")
    small = dataclasses.replace(workload.shape, lengths_q=(6,), lengths_k=(20,), heads=2, head_dim=32)
    inputs = attention.make_inputs(small, torch.float32)
    monkeypatch.setattr(races, "make_inputs", lambda *_: inputs)
    row = backend.TABLES["cross_attention"].row("cpu")
    right = row.functions["cross_attention_bwd"]
    wrong = {**row.functions, "cross_attention_bwd": lambda *args: tuple(2 * grad for grad in right(*args))}
    others = [one for one in backend.TABLES["cross_attention"].backends if one.name != "cpu"]
    changed = dataclasses.replace(row, functions=wrong)
    monkeypatch.setattr(backend.TABLES["cross_attention"], "backends", [changed, *others])
    tuned = tune.Tuned()
    decided = races.race_attention(workload, torch.float32, tuned, lambda call, _: call() and 1.0, "cpu", BUDGET)
    assert decided == ["cross_attention/fwd-b1-q8-k32-h2-d32-float32"]
