"""``python -m bench.tune`` with a fake device, launcher and clock: nothing here needs a GPU."""

from __future__ import annotations

import json
import types

import pytest
import torch

from bench import tune
from bench.timing import Budget
from hia_kernels.core import tuning

DEVICE = torch.device("cuda", 0)
HEURISTIC = {"BLOCK_R": 8, "num_warps": 4, "num_stages": 2}
BUDGET = Budget(0.0, at_least=3)


@pytest.fixture(autouse=True)
def fake_device(monkeypatch):
    monkeypatch.setattr(tuning, "_device_name", lambda _index: "Fake 9000")
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


def test_the_fastest_is_kept_and_only_what_differs():
    tuned = tuned_by(lambda config: 1.0 if config["num_warps"] == 8 else 2.0)
    assert tuned.configurations == {"fake/fwd-c64": {"num_warps": 8}}
    assert tuned.gains == {"fake/fwd-c64": 2.0}


def test_a_gain_within_the_noise_changes_nothing():
    assert tuned_by(lambda config: 0.98 if config["num_warps"] == 8 else 1.0).configurations == {}


def test_wrong_results_and_failures_are_not_timed():
    def problem(config):
        if config["num_warps"] == 2:
            raise RuntimeError("out of resources: shared memory")
        return "dx: rel-RMS" if config["num_warps"] == 8 else None

    tuned = tuned_by(lambda config: 1.0 / config["num_warps"] + config["num_stages"] / 100, problem)
    assert tuned.configurations == {"fake/fwd-c64": {"num_stages": 1}}


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
    for name, listed in (("triton_fwd", {"fwd": [{"BLOCK_R": 16}], "rows": [{"BLOCK_R": 1}]}),
                         ("triton_bwd", [{"num_warps": 8}]), ("library", [{"never": 1}])):  # fmt: skip
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
    tune.write(path, tuned, {"device": "Fake 9000"})
    assert tuning.stored("fake-9000") == {"fake/fwd-c64": {"num_warps": 8}, "fake/old": {"num_warps": 1}}
    launcher = Launcher()
    launcher()
    assert launcher.config == {**HEURISTIC, "num_warps": 8}
    tuning.stored.cache_clear()


def test_needs_a_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--op", "stemm"])
    assert "did you mean stem" in capsys.readouterr().err
