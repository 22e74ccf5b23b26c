"""The ablation's machinery on a host of three layers and two steps; that the adapter learns is its own --quick run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import __main__ as bench
from bench.ablation import report, train
from bench.ablation import run as command
from bench.ablation.pretrain import pretrain, targets
from bench.ablation.protocol import FULL, ROWS, START_ROWS, Protocol, row_named
from bench.ablation.train import TEST, TRAIN, Material, build, run, start_parts
from bench.records import files
from bench.records.environment import REPOSITORY, without_folders
from hia.config import RUN_OPTIONS
from hia.layers.extractor import CONDITION_GAIN
from hia.phantom.host import TinyHostRecipe

TINY = Protocol(
    size=64,
    train_samples=12,
    test_samples=2,
    steps=2,
    batch_size=4,
    encoder_steps=2,
    encoder_batch=3,
    host=TinyHostRecipe(layers=4, hidden_size=32, samples=10, tower_steps=1, steps=1),
    evaluate_every=1,
    curve_samples=1,
    seeds=(0, 1),
    config={
        "dim": 32,
        "num_heads": 2,
        "num_queries": 8,
        "encoder": "strided",
        "encoder_stride": 16,
        "encoder_width": 4,
        "query_residual": True,
    },
)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(TINY, tmp_path_factory.mktemp("ablation"))


def silent(_text):
    pass


def options_of(model):
    return {name: getattr(model, name) for name in RUN_OPTIONS}


def typed(words) -> int:
    return bench.main(["ablation", *map(str, words)])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_trains_what_it_says(row, material):
    model = build(material, row, 0, silent)
    full, own = ({**m.hia_config.to_dict(), **options_of(m)} for m in (build(material, FULL, 0, silent), model))
    changes = json.loads(json.dumps(row.changes))
    assert {name: value for name, value in own.items() if value != full[name]} == changes
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = run(material, row, 0, silent)
    assert set(result["scores"]) == set(TINY.tasks) and result["row"] == row.name and result["steps"] == 2
    assert [point["step"] for point in result["curve"]] == [1, 2]
    assert all(0 <= score <= 1 for score in result["scores"].values())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())  # a run has a model of its own
    json.dumps(result)


def test_a_run_can_be_repeated(material):
    first, again = (run(material, FULL, 1, silent) for _ in range(2))
    for name in ("scores", "health"):
        assert first[name] == again[name]
    assert [point["loss"] for point in first["curve"]] == [point["loss"] for point in again["curve"]]
    assert run(material, FULL, 0, silent)["curve"][0]["loss"] != first["curve"][0]["loss"]


def test_without_high_resolution_the_encoder_sees_the_hosts_pixels(material):
    row = row_named("no-high-resolution")
    model = build(material, row, 0, silent)
    seen = []
    original = model.adapter.encoder.forward_many
    model.adapter.encoder.forward_many = lambda images, *rest: (
        seen.extend(x.shape for x in images) or original(images, *rest)
    )
    batch = material.batches(TEST, 8, 0, silent).batch([0])
    with torch.no_grad():
        model(**batch)
    assert [tuple(shape) for shape in seen] == [(40, 40, 1)]
    high, low = (material.encoder_state(kind, silent) for kind in (False, True))
    assert not torch.equal(high["conv1.weight"], low["conv1.weight"])


def test_held_out_phantoms_are_others(material):
    train, test = material.batches(TRAIN, 12, 0, silent), material.batches(TEST, 8, 0, silent)
    assert not any(torch.equal(a, b) for a in train.pixels for b in test.pixels)
    again = material.batches(TRAIN, 12, 0, silent)
    assert all(torch.equal(a, b) for a, b in zip(train.pixels, again.pixels, strict=True))


def test_the_starts_parts(material):
    def spread(parts):
        model = build(material, FULL, 0, silent)
        start_parts(model.adapter, parts)
        extractor = next(iter(model.adapter.layers.values())).extractor
        gain = {name: getattr(extractor, name) for name in ("q_proj", "condition")}
        return [m.weight.std().item() * m.in_features**0.5 for m in gain.values()], extractor

    (q, condition), extractor = spread(("linears", "queries", "condition"))
    assert q == pytest.approx(1, rel=0.15) and condition == pytest.approx(CONDITION_GAIN, rel=0.15)
    assert extractor.queries.std() > 0.5 and not extractor.q_proj.bias.any()
    (q, condition), extractor = spread(())
    assert q == pytest.approx(3**-0.5, rel=0.15) and condition == pytest.approx(3**-0.5, rel=0.15)
    assert extractor.queries.std() < 0.03 and extractor.q_proj.bias.any()
    (q, condition), _ = spread(("condition",))
    assert q == pytest.approx(3**-0.5, rel=0.15) and condition == pytest.approx(CONDITION_GAIN * 3**-0.5, rel=0.15)
    injection = next(iter(build(material, FULL, 0, silent).adapter.layers.values())).injection
    assert not injection.out_proj.weight.any()  # attaching changes no bit, whatever the start


def test_targets_of_pretraining():
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[0, 17, 40] = True
    present, radius = targets(mask, (4, 4))
    assert present[0].nonzero().tolist() == [[1, 2]] and not present[1].any()
    assert radius[0].item() == pytest.approx((1 / torch.pi) ** 0.5) and radius[1] == 0


def test_pretraining_learns_and_restores(material):
    model = build(material, FULL, 0, silent)
    encoder = model.adapter.encoder
    batches = material.batches(TRAIN, 12, 0, silent)
    before = {name: p.clone() for name, p in encoder.state_dict().items()}
    settings = {"batch": 4, "lr": 1e-2, "seed": 0}
    losses = [pretrain(encoder, batches.pixels, batches.windows, batches.masks, steps=n, **settings) for n in (1, 60)]
    assert losses[1] < losses[0]
    assert not encoder.live_statistics and encoder.position == "sincos" and not encoder.training
    assert not torch.equal(encoder.norms[0].running_mean, before["norms.0.running_mean"])
    assert isinstance(encoder.convs[0], nn.Conv2d)


def test_the_command_runs_what_is_missing_and_writes_tables(tmp_path, monkeypatch, capsys, material):
    monkeypatch.setattr(command, "Protocol", lambda: TINY)
    monkeypatch.setattr(command, "workers", in_this_process)
    words = ["--rows", "full", "m4", "--jobs", "1", "--cache", str(material.cache), "--out", str(tmp_path / "runs")]
    assert typed(words) == 0
    text = (tmp_path / "runs" / "ablation.md").read_text()
    assert "| full | 2 |" in text and "| M = 4 | 2 |" in text and "*chance*" in text and "54.8 / 49.5" in text
    assert (tmp_path / "runs" / "ablation.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "runs" / "ablation.json").read_text())
    assert len(record["runs"]) == 4 and record["protocol"]["steps"] == 2
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*-?.json")}
    assert typed(words) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*-?.json")}
    assert "step 1 of 2" in capsys.readouterr().out


@contextmanager
def in_this_process(_jobs, _threads):
    def submit(function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    yield submit


def test_runs_of_another_protocol_are_not_reused(tmp_path, monkeypatch, material, capsys):
    monkeypatch.setattr(command, "workers", in_this_process)
    words = ["--rows", "full", "--seeds", "1", "1", "--cache", str(material.cache), "--out", str(tmp_path)]
    for steps in (2, 1):
        monkeypatch.setattr(command, "Protocol", lambda steps=steps: dataclasses.replace(TINY, steps=steps))
        assert typed(words) == 0
        (run,) = json.loads((tmp_path / "ablation.json").read_text())["runs"]
        assert run["steps"] == steps
    monkeypatch.setattr(command, "row_named", lambda name: dataclasses.replace(FULL, changes={"num_queries": 2}))
    assert typed(words) == 0
    (again,) = json.loads((tmp_path / "ablation.json").read_text())["runs"]
    assert again["protocol"] != run["protocol"]  # the row means something else now: it was run again
    capsys.readouterr()
    (tmp_path / "full-1.json").write_text("{")
    assert typed(words) == 2
    said = capsys.readouterr().err
    assert "full-1.json must be a JSON file, got: " in said and "; delete it" in said
    (tmp_path / "full-1.json").write_text("{}")
    assert typed(words) == 2
    assert "full-1.json must hold a run of this command, got something else" in capsys.readouterr().err


@pytest.fixture
def told_runs(monkeypatch):
    """The command without its training: each run scores a half."""

    def told(protocol, _cache, row, seed, environment, _start, place):
        health = {"layers.0.update_ratio": 1.0}
        files.write_json(
            place,
            {
                "row": row.name,
                "seed": seed,
                "protocol": protocol.fingerprint(row=row),
                "environment": environment,
                "scores": dict.fromkeys(protocol.tasks, 0.5),
                "health": {"before": health, "after": health},
                "seconds_a_step": 1.0,
            },
        )

    monkeypatch.setattr(command, "workers", in_this_process)
    monkeypatch.setattr(command, "prepare", lambda *_: [])
    monkeypatch.setattr(command, "run_row", told)
    monkeypatch.setattr(command.Material, "host_scores", lambda _: {"lesions": {"disease": 0.5}})


def test_other_files_and_another_protocols_host_stay_out_of_the_tables(tmp_path, monkeypatch, told_runs):
    words = ["--rows", "full", "--seeds", "1", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "runs")]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "my-notes.json").write_text('{"row": 1}')
    for size in (64, 96):
        scores = {"lesions": {"disease": size / 100}}
        monkeypatch.setattr(command, "Protocol", lambda size=size: dataclasses.replace(TINY, size=size))
        monkeypatch.setattr(command.Material, "host_scores", lambda _, scores=scores: scores)
        assert typed(words) == 0
        record = json.loads((tmp_path / "runs" / "ablation.json").read_text())
        assert record["host"] == scores and len(record["runs"]) == 1


def test_only_whole_tables_are_recorded(tmp_path, monkeypatch, told_runs, capsys):
    monkeypatch.setattr(command, "Protocol", lambda: TINY)
    monkeypatch.setattr(files, "RESULTS", tmp_path / "repository")
    words = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "runs"), "--record"]
    assert typed([*words, "--rows", "full"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "--record must have all rows and seeds of the tables, 22 are left: early 0, early 1, half 0,"
    )
    assert not (tmp_path / "repository").exists()
    assert typed(words) == 0
    (written,) = {path.parent for path in (tmp_path / "repository").rglob("ablation.*")}
    assert sorted(path.name for path in written.iterdir()) == ["ablation.json", "ablation.md", "ablation.png"]
    assert "`python -m bench" in (written / "ablation.md").read_text()


def test_without_folders_runs_and_tables_go_to_out(tmp_path, monkeypatch, told_runs):
    monkeypatch.setattr(command, "Protocol", lambda: TINY)
    monkeypatch.setattr(files, "OUT", tmp_path / "out")
    assert typed(["--rows", "full", "--seeds", "1", "--cache", tmp_path / "cache"]) == 0
    (folder,) = {path.parent for path in (tmp_path / "out").rglob("*.json")}
    assert folder.name == f"ablation-{TINY.fingerprint()}"
    assert {"ablation.md", "full-1.json"} <= {path.name for path in folder.iterdir()}


def test_a_damaged_cache_says_what_to_delete(tmp_path):
    place = tmp_path / "encoder.pt"
    place.write_bytes(b"half")
    with pytest.raises(ValueError, match=f"{place} must be whole, got: .*; delete {tmp_path} to have it made anew"):
        train._load(place, weights_only=True)


def test_a_command_is_kept_without_its_folders():
    said = "python -m bench ablation --rows full --out /home/me/runs --cache=/data/c --record"
    assert without_folders(said) == "python -m bench ablation --rows full --record"


def test_workers_end_with_the_command(tmp_path):
    """Killed without a word, interrupted, or by a call that fails: no process is left, and none waits for others."""
    script = (
        "import sys, time, os, signal\n"
        "from bench.ablation.workers import finish, workers\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "    with workers(2, 1) as submit:\n"
        "        calls = [submit(time.sleep, 100), submit(time.sleep, 0)]\n"
        "        calls[1].result()\n"
        "        import multiprocessing\n"
        "        print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
        "        finish([*calls, submit(int, 'x')] if 'fail' in sys.argv else calls)\n"
    )
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "python")])}
    for how in ("fail", signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        command_line = [sys.executable, str(tmp_path / "script.py"), str(how)]
        parent = subprocess.Popen(
            command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) == 2
        if how != "fail":
            parent.send_signal(how)
        assert parent.wait(60) != 0
        deadline = time.monotonic() + 30
        while any(alive(pid) for pid in children) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not any(alive(pid) for pid in children), how


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("full", "low", "code"), [(0.95, 0.5, 0), (0.85, 0.5, 1), (0.95, 0.8, 1)], ids=["learnt", "chance", "leak"]
)
def test_the_quick_runs_verdict(full, low, code, capsys):
    results = [
        {"row": row, "seed": 0, "scores": {"disease": score}}
        for row, score in (("full", full), ("no-high-resolution", low))
    ]
    assert command.verdict(results, 0) == code
    assert ("FAILED" in capsys.readouterr().out) is bool(code)


def test_tables_show_mean_and_spread():
    scores = [{"description": a, "disease": 0.5, "location": 0.25, "comparative": 0.2} for a in (0.1, 0.3, 0.2)]
    runs = [{"row": "full", "seed": seed, "scores": own} for seed, own in enumerate(scores)]
    (line,) = [line for line in report._table(runs, ROWS, TINY.tasks) if line.startswith("| full")]
    assert "| 3 | 0.20 (0.10-0.30) | 0.50 (0.50-0.50) |" in line


def test_names_and_errors(capsys):
    names = [row.name for row in (*ROWS, *START_ROWS)]
    assert len(set(names)) == len(names)
    assert typed(["--rows", "fulll"]) == 2
    said = capsys.readouterr().err
    assert "--rows: must be among full" in said and "did you mean full?" in said
    for words, said in (
        (["--jobs", "0"], "--jobs: must be at least 1, got 0"),
        (["--quick", "--rows", "m4"], "--rows: must not be given with --quick"),
        (["--quick", "--record"], "--record: must not be given with --quick"),
        (["--rows", "m4", "--start"], "--rows: must not be given with --start"),
    ):
        assert typed(words) == 2
        assert said in capsys.readouterr().err
    assert Protocol().fingerprint() == dataclasses.replace(Protocol(), seeds=(7,)).fingerprint()
    assert Protocol().fingerprint() != dataclasses.replace(Protocol(), lr=1.0).fingerprint()
    assert Protocol().test_samples >= 240 and len(Protocol().seeds) == 3 and Protocol().host.layers >= 12
