"""The targets and their verdicts; the providers, costs and limits they need."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch

from bench import workloads
from bench.__main__ import main as bench
from bench.measure import accuracy, costs
from bench.measure.memory import memory_of
from bench.measure.timing import OutOfTime, time_limit
from bench.ops import entries, session
from bench.ops import plan as ops_plan
from bench.providers import layers as composites
from bench.providers import registry as providers
from bench.records import targets as catalogue
from bench.records.record import Measurement, read_records, write_records
from bench.records.targets import KINDS, TARGETS, Target
from bench.targets import run as targets
from bench.targets.verdicts import judge
from hia.layers import plan

OP, CASE = "adapter_layer", "13b-released-896-2img"
SPEED = Target("speed", "speedup", OP, CASE, "forward", ("released", "released_compile"), 1.5, 2.0)


def row(provider, p50=1.0, status="ok", **more) -> Measurement:
    times = {"p20_ms": p50, "p50_ms": p50, "p80_ms": p50} if status == "ok" else {"reason": "out of luck"}
    return Measurement("composite", OP, CASE, provider, "forward", "fp32", "cpu", status, **{**times, **more})


def test_targets_name_what_exists():
    assert len({target.name for target in TARGETS}) == len(TARGETS)
    known = providers.all_providers()
    for target in TARGETS:
        assert target.kind in KINDS
        if not target.mode:
            continue
        workload = target.workload
        assert workload in workloads.workloads(target.op), target.name
        assert ops_plan.modes_of(workload, (target.mode,)) == (target.mode,)
        assert all(known[name].serves(workload) for name in target.against), target.name


def test_targets_are_those_agreed():
    targets = {target.name: (target.cpu, target.cuda) for target in TARGETS}
    assert targets["layer-896"] == (1.5, 2.0) and targets["layer-896-compile"] == (1.3, 1.5)
    assert targets["layer-1792"] == (2.0, 2.0) and targets["layer-4096"] == (2.2, 3.0)
    assert targets["second-question-896"] == (2.0, 2.5) and targets["layer-896-gemms"] == (1.2, 1.25)
    assert targets["attention-128-16384-backward"] == (None, 1.0)
    assert targets["attention-640-12544-forward"] == (1.0, 2.0)
    assert targets["encode-896-roofline"] == (0.85, 0.6) and targets["stem-16bit"] == (3.0, 5.0)


def test_the_best_of_the_others_counts():
    rows = [row("hia", 10.0), row("released", 30.0), row("released_compile", 18.0)]
    found = judge(SPEED, rows, "cpu")
    assert (found.ratio, found.target, found.verdict) == (pytest.approx(1.8), 1.5, "met")
    assert found.note == "hia 10 ms, released_compile 18 ms"
    assert judge(SPEED, [replace(one, device="cuda") for one in rows], "cuda").verdict == "MISSED"
    over = replace(SPEED, kind="overhead", against=("gemms",), cpu=1.2)
    assert judge(over, [row("hia", 12.5), row("gemms", 10.0)], "cpu").verdict == "MISSED"


def test_memory_and_floor():
    rows = [
        row("hia", peak_bytes=30, percent_of_roofline=86.0, extra={"activation_bytes": 4}),
        row("released", peak_bytes=100, extra={"activation_bytes": 10}),
    ]
    assert judge(replace(SPEED, kind="peak", cpu=0.25), rows, "cpu").ratio == pytest.approx(0.3)
    assert judge(replace(SPEED, kind="activations", cpu=0.45), rows, "cpu").verdict == "met"
    assert judge(replace(SPEED, kind="roofline", cpu=0.85, against=()), rows, "cpu").verdict == "met"


def test_what_was_not_measured_says_why():
    assert judge(SPEED, [], "cpu").note == "hia: not run"
    rows = [row("hia"), row("released", status="failed")]
    found = judge(SPEED, rows, "cpu")
    assert (found.ratio, found.verdict) == (None, "not measured")
    assert found.note == "released: out of luck; released_compile: not run"
    assert judge(replace(SPEED, cpu=None), [row("hia"), row("released")], "cpu").verdict == "no target"


def test_flops_of_the_layers_meet_their_targets():
    found = {target.name: judge(target, [], "cuda") for target in TARGETS if target.kind == "flops"}
    assert found["table3-flops-896"].verdict == found["table3-flops-4096"].verdict == "met"
    assert "0.617 and 1.01 TFLOPs" in found["table3-flops-896"].note


@pytest.fixture
def tiny(monkeypatch):
    chosen = (
        Target(
            "tiny", "speedup", "second_question", "tiny-released", "forward", ("released", "released_compile"), 1e-6
        ),
        Target("tiny-gemms", "overhead", "second_question", "tiny-released", "forward", ("gemms",), 1e6),
        Target("step", "activations", "adapter_train_step", "tiny-released", "both", ("released",), 1e6),
    )
    for module in (catalogue, targets):
        monkeypatch.setattr(module, "TARGETS", chosen)
    return chosen


@pytest.mark.usefixtures("tiny")
def test_run_judges_writes_and_is_reported(tmp_path, capsys):
    folder = tmp_path / "results" / "made-up-cpu"
    arguments = ["--device", "cpu", "--quick", "--no-compile", "--out", str(folder)]
    assert bench(["targets", *arguments, "--only", "tiny*"]) == 0
    assert bench(["targets", *arguments, "--only", "step", "--add"]) == 0
    records = read_records(folder / "targets.json")
    assert {(record.op, record.provider) for record in records} == {
        ("second_question", "hia"),
        ("second_question", "gemms"),
        ("second_question", "released"),
        ("adapter_train_step", "hia"),
        ("adapter_train_step", "released"),
    }
    verdicts = {one["name"]: one for one in json.loads((folder / "targets.json").read_text())["targets"]}
    assert {one["verdict"] for one in verdicts.values()} == {"met"}
    assert "2 met, 0 MISSED" in capsys.readouterr().out
    assert bench(["report", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "made-up-cpu.md").read_text()
    assert "3 met." in page and "| tiny-gemms |" in page and "python -m bench targets" in page


@pytest.mark.usefixtures("tiny")
def test_a_second_run_adds_by_provider(tmp_path, capsys):
    """A row that the first had and the second did not reach, interrupted say, stays; two runs' ratio says so."""
    old = [
        row("hia", 8.0, environment={"date": "yesterday"}),
        row("textbook", environment={"date": "yesterday"}),
        row("released", 4.0, environment={"date": "yesterday"}),
    ]
    old = [replace(one, op="second_question", case="tiny-released") for one in old]
    write_records(tmp_path / "targets.json", old)
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--only", "tiny-gemms"]
    assert bench(["targets", *arguments, "--add"]) == 0
    found = {one.provider: one for one in read_records(tmp_path / "targets.json")}
    assert set(found) == {"hia", "textbook", "released", "gemms"}
    assert found["released"] == old[2] and found["hia"] != old[0]
    verdicts = {one["name"]: one for one in json.loads((tmp_path / "targets.json").read_text())["targets"]}
    assert "in two runs" not in verdicts["tiny-gemms"]["note"]
    assert (
        verdicts["tiny"]["note"].endswith("released yesterday") and "; in two runs: hia 20" in verdicts["tiny"]["note"]
    )
    (tmp_path / "targets.json").write_text("[")
    assert bench(["targets", *arguments, "--add"]) == 2
    assert f"--out: {tmp_path / 'targets.json'} must hold the records" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_only_what_compiles_or_only_what_does_not(capsys, monkeypatch):
    tasks = targets.tasks_of(targets.choose("cpu", [], compiled_only=True))
    asked = [(one.workload.op, one.providers) for one in tasks]
    assert asked == [("second_question", ("hia", "gemms", "released", "released_compile"))], "all of it, in turns"
    monkeypatch.setattr(targets, "TARGETS", (replace(catalogue.TARGETS[0], against=("released_compile",)),))
    assert targets.tasks_of(targets.choose("cpu", [], compile=False)) == [], "ours would be compared with nobody"
    roofline = replace(catalogue.TARGETS[0], name="own", kind="roofline", against=())
    monkeypatch.setattr(targets, "TARGETS", (roofline,))
    assert [one.providers for one in targets.tasks_of(targets.choose("cpu", [], compile=False))] == [("hia",)]
    assert bench(["targets", "--device", "cpu", "--no-compile", "--compiled"]) == 2
    assert "--compiled: must not be given with --no-compile" in capsys.readouterr().err


def test_a_deadline_cuts_the_least_important():
    found = [(one.op, one.name) for one in targets.grouped(TARGETS)]
    attention = [f"{kind}-896:extract" for kind in ("13b-released", "7b-released", "13b")]  # heads of 640, 512, 128
    assert found[:7] == [
        ("encode", "px896"),
        *(("cross_attention", name) for name in attention),
        ("adapter_layer", CASE),
        ("second_question", CASE),
        ("stem", "px2048-16bit"),
    ]
    sides = [next(side for side in ("896", "1792", "2048", "4096", "3584") if side in name) for _, name in found[7:]]
    order = ["896", "1792", "2048", "4096", "3584"]
    assert sides == sorted(sides, key=order.index)


@pytest.mark.usefixtures("tiny")
def test_nothing_begins_when_the_time_is_over(tmp_path, capsys):
    assert bench(["targets", "--device", "cpu", "--quick", "--minutes", "1e-9", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not begun, the time is over: ") == 2 and "3 not measured" in printed
    assert not (tmp_path / "targets.json").exists()


@pytest.mark.usefixtures("tiny")
def test_ctrl_c_keeps_the_workload_it_was_at(tmp_path, monkeypatch):
    run = session.Measuring.run

    def interrupted(self):
        run(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(session.Measuring, "run", interrupted)
    assert bench(["targets", "--device", "cpu", "--quick", "--no-compile", "--out", str(tmp_path)]) == 130
    assert {one.op for one in read_records(tmp_path / "targets.json")} == {"second_question"}


@pytest.mark.usefixtures("tiny")
def test_the_run_goes_on_without_whom_the_device_failed_in(tmp_path, monkeypatch, capsys):
    failures = [RuntimeError("CUDA error: an illegal memory access was encountered")]

    def synchronize(_device):
        if failures:
            raise failures.pop()

    monkeypatch.setattr(session, "synchronize", synchronize)
    assert bench(["targets", "--device", "cpu", "--quick", "--no-compile", "--out", str(tmp_path)]) == 1
    assert "in hia second_question tiny-released: the rest went on" in capsys.readouterr().out.replace("\n", " ")
    found = {(one.op, one.provider): one.status for one in read_records(tmp_path / "targets.json")}
    assert found.pop(("second_question", "hia")) == "failed" and set(found.values()) == {"ok"}
    assert len(found) == 4


def test_bad_flags(capsys):
    for arguments, message in (
        (["--only", "layer-986"], "did you mean layer-896"),
        (["--minutes", "0"], "more than 0"),
    ):
        assert bench(["targets", "--device", "cpu", *arguments]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_the_set_of_the_suite_is_the_targets(capsys):
    assert bench(["ops", "--device", "cpu", "--set", "targets", "--list"]) == 0
    listed = {tuple(line.split("  ")[:2]) for line in capsys.readouterr().out.splitlines() if line.count("  ") > 2}
    assert listed == {(target.op, target.case) for target in TARGETS if target.mode}
    assert bench(["ops", "--device", "cpu", "--set", "target"]) == 2
    assert "did you mean targets" in capsys.readouterr().err


def subject(op, case="tiny-released", dtype=torch.float32):
    found = workloads.Workload(op, workloads.CASES[case])
    given = workloads.make_inputs(found, dtype, "cpu")
    return found, given, composites.make_weights(found.case, dtype, "cpu")


def test_ours_is_folded_and_a_second_question_has_what_was_kept(monkeypatch):
    monkeypatch.setattr("hia.layers.extractor.Extractor.gains_from_keys", lambda *_: True)  # tiny keys save nothing
    found, given, weights = subject("second_question")
    truth = accuracy.truth_of(found, given, weights, torch.float32, gradients=False)
    for name, forms in (("hia", "cached_kv/"), ("textbook", "direct/direct")):
        bound = providers.all_providers()[name].bind(found, given, weights, gradients=False)
        assert truth.check(accuracy.results_of(bound, truth.exact, gradients=False))[0] is None
        notes = bound.notes()
        assert notes["forms"].startswith(forms)
        assert ("kept_bytes" in notes) is (name == "hia")
    tokens = sum(found.case.feature_lengths)
    kept = providers.Ours().bind(found, given, weights, gradients=False).notes()["kept_bytes"]
    assert kept == tokens * 2 * found.case.config.dim * 4


def test_gemms_are_the_plans_products():
    found, given, weights = subject("adapter_layer")
    bound = providers.Gemms().bind(found, given, weights, gradients=False)
    ours = providers.Ours().bind(found, given, weights, gradients=False)
    assert bound.limit.endswith("our encoder") and bound.notes()["gemm_flops"] == ours.notes()["plan_flops"]
    assert entries.checked(bound, None, gradients=False) == (None, None)
    assert not providers.Gemms().serves(workloads.Workload("encode", workloads.CASES["px-tiny"]))


@pytest.mark.parametrize("op", ["second_question", "adapter_train_step"])
def test_the_plans_textbook_is_what_is_counted(op):
    found, given, weights = subject(op)
    notes = providers.Textbook().bind(found, given, weights, gradients=workloads.entry(op).trains).notes()
    mode = "both" if workloads.entry(op).trains else "forward"
    counted = costs.flops(found, given, weights, mode)
    if workloads.entry(op).trains:
        encoder = workloads.Workload("encode_train_step", found.case)
        images = {name: given[name] for name in ("images", "windows")}
        counted -= costs.flops(encoder, images, weights, "both")
    assert notes["textbook_flops"] == notes["plan_flops"] == pytest.approx(counted, rel=0.02)
    assert costs.least_flops(found, counted, 4) <= counted


def test_the_floor_is_of_the_cheapest_form():
    found = workloads.Workload("second_question", workloads.CASES["13b-released-896-2img"])
    step = composites.layer_case(found.case)
    sizes = plan.sizes_of(step.config, step.sizes, step.visual_tokens, step.batch, 2)
    whole = sum(
        next(f.flops for f in forms if f.name == "direct")
        for forms in (plan.extract_forms(sizes), plan.inject_forms(sizes))
    )
    assert costs.least_flops(found, round(whole), 2) < 0.5 * whole
    assert costs.least_flops(workloads.Workload("encode", workloads.CASES["px224"]), 7, 2) == 7


@pytest.mark.parametrize("op", ["row_softmax", "latent_attention", "head_linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_of_absorbed_attention_pass_the_gate(op, dtype):
    for found in workloads.workloads(op):
        if found.case.name == "tiny-released":
            given = workloads.make_inputs(found, dtype, "cpu")
            truth = accuracy.truth_of(found, given, None, dtype, gradients=True)
            bound = providers.Ours().bind(found, given, None, gradients=True)
            problem, _ = truth.check(accuracy.results_of(bound, truth.exact, gradients=True))
            assert problem is None and truth.plain["out0"].dtype == dtype
            expected, both = 0, 0.0
            if op == "latent_attention":
                expected, both = 4 * given["latent"].numel() * given["q"].shape[1], 3.5
            elif op == "head_linear":
                expected, both = 2 * given["x"].numel() * given["weight"].shape[1], 3.0
            assert costs.flops(found, given, None, "forward") == expected
            assert costs.flops(found, given, None, "both") == round(expected * both)
            outs = workloads.op_entry(op).reference(**given)
            moved = costs.moved_bytes(found, given, None, outs, "forward", itemsize=dtype.itemsize)
            tensors = [
                value
                for value in (*given.values(), *(outs if isinstance(outs, tuple) else (outs,)))
                if isinstance(value, torch.Tensor)
            ]
            assert moved == sum(tensor.nbytes for tensor in tensors)


def test_the_usual_stem_copies_three_channels():
    found = workloads.Workload("stem", workloads.ImageCase("grey", ((64, 96),), width=8, bits=16))
    given = workloads.make_inputs(found, torch.float32, "cpu")
    assert given["pixels"].dtype == torch.uint16 and int(given["pixels"].int().max()) > 255
    truth = accuracy.truth_of(found, given, None, torch.float32, gradients=True)
    rgb = providers.all_providers()["eager_rgb"].bind(found, given, None, gradients=True)
    assert truth.check(accuracy.results_of(rgb, truth.exact, gradients=True))[0] is None
    assert memory_of(rgb.forward, "cpu").peak > 3 * 64 * 96 * 4, "a float copy of three channels"


def test_released_encoder_trains_like_ours():
    found = workloads.Workload("encode_train_step", workloads.CASES["px-tiny"])
    given = workloads.make_inputs(found, torch.float32, "cpu")
    weights = composites.make_weights(found.case, torch.float32, "cpu")
    truth = accuracy.truth_of(found, given, weights, torch.float32, gradients=True)
    assert {"out0", "dencoder"} == set(truth.exact)
    for provider in (providers.Ours(), providers.Released()):
        bound = provider.bind(found, given, weights, gradients=True)
        assert truth.check(accuracy.results_of(bound, truth.exact, gradients=True))[0] is None


def test_flipped_kinks_are_let_through_in_the_encoders_gradient_alone():
    exact = {"dencoder": torch.ones(100, dtype=torch.float64), "dinjection": torch.ones(100, dtype=torch.float64)}
    plain_results = {name: value.float() for name, value in exact.items()}
    truth = accuracy.Truth(exact, plain_results, torch.float32)

    def check(name, factor):
        return truth.check({**plain_results, name: plain_results[name] * factor})[0]

    assert check("dencoder", 1.004) is None
    assert check("dencoder", 1.01).startswith("dencoder: rel-RMS")
    assert check("dencoder", float("nan")).startswith("dencoder: NaN")
    assert (check("dinjection", 1.0001) or "let through").startswith("dinjection: rel-RMS")


def test_a_limit_is_no_rival(tmp_path):
    from bench.report import data, markdown, sections
    from bench.report.speedup import speedups

    rows = [
        row("hia", 2.0, extra={"forms": "a/b", "plan_flops": 10**9, "textbook_flops": 2 * 10**9}),
        row("gemms", 1.0, extra={"limit": "the bare products of our plan"}),
        row("eager", 3.0),
    ]
    (speedup,) = speedups(rows)
    assert set(speedup.against) == {"eager"} and speedup.slower == () and speedup.beside == {}
    write_records(tmp_path / "device" / "kernels.json", rows)
    results = data.load(tmp_path / "device")
    section = sections.limits(results)
    assert section.parts[0].rows[0][-1] == "2.00"
    page = markdown.page(results, sections.report(results))
    assert "Beside the bare matrix products" in page and "The limit is the bare products of our plan." in page


def test_a_time_limit_ends_what_is_inside_alone():
    began = time.perf_counter()
    with pytest.raises(OutOfTime), time_limit(0.05):
        while time.perf_counter() - began < 5:
            pass
    assert time.perf_counter() - began < 1
    with time_limit(None):
        pass
    time.sleep(0.06)  # nothing is left of the timer


def test_compiling_too_long_is_a_reason(tmp_path, monkeypatch):
    class Slow(providers.Eager):
        name, compiles = "eager", True

        def bind(self, *args, **kwargs):
            time.sleep(5)

    for module in (targets, session):
        monkeypatch.setattr(module, "all_providers", lambda: {"hia": providers.Ours(), "eager": Slow()})
    chosen = (Target("slow", "speedup", "stem", "px-tiny", "forward", ("eager",), 1.0),)
    for module in (catalogue, targets):
        monkeypatch.setattr(module, "TARGETS", chosen)
    arguments = ["--device", "cpu", "--quick", "--compile-minutes", "0.001", "--out", str(tmp_path)]
    assert bench(["targets", *arguments]) == 0
    (verdict,) = json.loads((tmp_path / "targets.json").read_text())["targets"]
    assert verdict["verdict"] == "not measured" and "compiling took more than the 0 s" in verdict["note"]
