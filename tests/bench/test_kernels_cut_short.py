"""``python -m bench ops`` cut short: by its end, by a device that fails, by what was there before."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from bench import workloads
from bench.ops import options as kernels_args
from bench.ops import output as kernels_output
from bench.ops import run as kernels
from bench.providers import registry as providers
from bench.records.record import Measurement, read_records, write_records

RECORD = Measurement(
    "op",
    "stem",
    "px224",
    "hia",
    "forward",
    "fp32",
    "cpu",
    "ok",
    p20_ms=1.0,
    p50_ms=2.0,
    p80_ms=3.0,
    repeats=5,
)


def workload(op, case, role=""):
    return workloads.Workload(op, workloads.CASES[case], role)


def fake_run(chosen, *, saves_time=False, **more):
    limits = kernels.Limits(1e9, {"fp32": 1e9})
    return kernels.Run("cpu", list(chosen), limits, {}, True, saves_time, kernels.cpu_clock, **more)


def test_who_is_left_out_of_compiling_says_so(monkeypatch):
    run = fake_run(providers.all_providers().values(), saves_time=True)
    far = kernels.Subject(workload("stem", "px4096"), "bf16", {}, None)
    near = kernels.Subject(workload("stem", "px896"), "bf16", {}, None)
    run.device = "cuda"
    compiled = next(provider for provider in run.providers if provider.name == "compile")
    reason = kernels.unavailable_reason(run, compiled, far, "forward")
    assert reason == "left out to save time where nothing was asked for by name"
    assert kernels.unavailable_reason(run, compiled, near, "forward") == providers.compiler_missing("cuda")


def test_a_device_that_fails_is_one_failure(monkeypatch):
    """As after an illegal access: the next synchronisation raises, and so would all that follow."""
    broken = []

    class Breaks(providers.Eager):
        name = "breaks"

        def bind(self, *args, **kwargs):
            broken.append(True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def synchronize(_device):
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(kernels, "synchronize", synchronize)
    run = fake_run([providers.Ours(), Breaks(), providers.Eager()])
    kernels.measure_workload(run, workload("stem", "px-tiny"), "fp32", ("forward", "backward"))
    kernels.measure_workload(run, workload("inject_rows", "tiny"), "fp32", ("forward",))
    why = "the device failed in breaks stem px-tiny (CUDA error: an illegal memory access was encountered)"
    assert run.failure == why
    assert str(run.resume) == "0:breaks"
    found = {(one.op, one.mode, one.provider): (one.status, one.reason) for one in run.records}
    rest = {("stem", mode, name) for mode in ("forward", "backward") for name in ("hia", "breaks", "eager")}
    rest |= {("inject_rows", "forward", name) for name in ("hia", "breaks", "eager")}
    assert set(found) == rest and found.pop(("stem", "forward", "breaks")) == ("failed", why)
    assert set(found.values()) == {("unavailable", f"not run: {why}")}


def test_a_device_that_fails_while_it_is_timed(monkeypatch):
    """Whose call raised first is to blame; what the others measured before stands."""
    calls = []

    class Breaks(providers.Eager):
        name = "breaks"

        def bind(self, *args, **kwargs):
            bound = super().bind(*args, **kwargs)
            forward = bound.forward

            def run():
                calls.append(True)
                return forward()

            bound.forward = run
            return bound

    def clock(call, times):
        if len(calls) > 4:
            raise RuntimeError("CUDA error: misaligned address")
        return kernels.cpu_clock(call, times)

    def synchronize(_device):
        if len(calls) > 4:
            raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(kernels, "synchronize", synchronize)
    run = fake_run([providers.Ours(), Breaks(), providers.Eager()], seconds=0.1)
    run.clock = clock
    kernels.measure_workload(run, workload("inject_rows", "tiny"), "fp32", ("forward",))
    found = {one.provider: one for one in run.records}
    assert run.failure.startswith("the device failed in ")
    (failed,) = [one.provider for one in run.records if one.status == "failed"]
    assert f"in {failed} inject_rows tiny" in run.failure
    assert {one.status for name, one in found.items() if name != failed} == {"unavailable"}


def test_a_failed_device_ends_in_a_clear_message_and_a_fresh_run_goes_on(tmp_path, monkeypatch, capsys):
    def synchronize(_device):
        raise RuntimeError("CUDA error: device-side assert triggered")

    before = kernels.synchronize
    monkeypatch.setattr(kernels, "synchronize", synchronize)
    arguments = ["--quick", "--device", "cpu", "--op", "inject_rows,stem", "--mode", "forward"]
    assert kernels.main([*arguments, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out.replace("\n", " ")
    assert (
        "the device failed in hia inject_rows tiny (CUDA error: device-side assert triggered): nothing more" in printed
    )
    rows = [one for one in read_records(tmp_path / "kernels.json") if one.op == "stem"]
    assert rows and all(one.reason.startswith("not run: the device failed in hia inject_rows tiny") for one in rows)
    assert "the same command with --resume 0:hia goes on" in printed
    monkeypatch.setattr(kernels, "synchronize", before)
    assert kernels.main([*arguments, "--out", str(tmp_path), "--resume", "0:hia"]) == 0
    found = {(one.op, one.provider): one for one in read_records(tmp_path / "kernels.json")}
    assert found["inject_rows", "hia"].status == "failed", "what the first run found stays"
    assert found["inject_rows", "eager"].status == found["stem", "hia"].status == "ok"
    assert not [one for one in found.values() if "not run" in (one.reason or "")]


def test_where_a_fresh_process_goes_on(capsys):
    first = kernels_args.Resume()
    again = first.after(3, "ffpa", ["hia", "ffpa"])
    assert str(again) == "3:ffpa" and kernels_args.Resume.parse("3:ffpa") == again
    assert str(again.after(3, "hia", ["hia"])) == "3:ffpa,hia" and str(again.after(4, "hia", ["hia"])) == "4:hia"
    assert str(again.after(3, "the reference of", ["hia"])) == "4:", "the task can't be done at all"
    ours, eager = providers.Ours(), providers.Eager()
    resume = kernels_args.Resume.parse("3:hia")
    assert [resume.providers(number, [ours, eager]) for number in (2, 3, 4)] == [[], [eager], [ours, eager]]
    with pytest.raises(SystemExit):
        kernels.main(["--device", "cpu", "--resume", "ffpa"])
    assert "must be NUMBER:[PROVIDER,...] as a failed run prints it, got 'ffpa'" in capsys.readouterr().err


def test_a_gradient_reference_that_raises_leaves_the_forward_alone(tmp_path, monkeypatch):
    truth_of = kernels.truth_of

    def without_gradients(*args, gradients):
        if gradients:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return truth_of(*args, gradients=gradients)

    monkeypatch.setattr(kernels, "truth_of", without_gradients)
    arguments = ["--quick", "--device", "cpu", "--op", "stem", "--mode", "forward,backward,both", "--provider", "hia"]
    assert kernels.main([*arguments, "--out", str(tmp_path)]) == 1
    found = [(one.provider, one.mode, one.status) for one in read_records(tmp_path / "kernels.json")]
    assert found == [("hia", "forward", "ok"), ("reference", "backward", "failed"), ("reference", "both", "failed")]


def test_a_partial_run_adds_to_the_record_and_a_whole_one_replaces_it(tmp_path):
    absent = {"status": "unavailable", "reason": "no", "p20_ms": None, "p50_ms": None, "p80_ms": None}
    old, other = replace(RECORD, p20_ms=9.0, p50_ms=9.0, p80_ms=9.0), replace(RECORD, provider="eager")
    write_records(tmp_path / "kernels.json", [old, other, replace(RECORD, case="px448", **absent)])
    options = kernels_args.parse(["--device", "cpu", "--out", str(tmp_path), "--json", str(tmp_path / "own.json")])
    writer = kernels_output.Writer(options, "A CPU")
    new = [RECORD, replace(other, **absent), replace(RECORD, case="px448", **{**absent, "reason": "why"})]
    writer(new)
    found = {(one.provider, one.case): one for one in read_records(tmp_path / "kernels.json")}
    assert found["hia", "px224"] == RECORD and found["eager", "px224"] == other, "no number is lost to a reason"
    assert found["hia", "px448"].reason == "why" and len(found) == 3
    assert read_records(tmp_path / "own.json") == new
    writer(new[:1], complete=True)
    assert read_records(tmp_path / "kernels.json") == new[:1]


@pytest.mark.parametrize("content", [b"[1", b"\xff\xfe", b'{"format": 9}'])
def test_a_broken_record_of_before_is_named(content, tmp_path, capsys):
    (tmp_path / "kernels.json").write_bytes(content)
    arguments = ["--quick", "--device", "cpu", "--op", "stem", "--out", str(tmp_path)]
    assert kernels.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"--out: {tmp_path / 'kernels.json'} must hold the records of an earlier run, got: ")
    assert "move it away, or name another folder" in error and "Traceback" not in error
    assert (tmp_path / "kernels.json").read_bytes() == content


def test_what_begins_late_does_not_overshoot(monkeypatch):
    class Slow(providers.Eager):
        name, compiles = "slow", True

        def bind(self, *args, **kwargs):
            time.sleep(30)

    monkeypatch.setattr(kernels, "LATE_S", 0.1)
    began = time.perf_counter()
    run = fake_run([providers.Ours(), Slow(), providers.Eager()], end=began + 1.5)
    kernels.measure_workload(run, workload("inject_rows", "tiny"), "fp32", ("forward", "both"))
    assert 1.4 < time.perf_counter() - began < 10 and run.cut
    assert {(one.status, one.reason) for one in run.records} == {("unavailable", kernels.OVER)}
    assert len(run.records) == 6


def test_a_run_with_an_end_limits_what_compiles():
    assert fake_run([]).allowance(compiles=True) is None
    run = fake_run([], end=time.perf_counter() + 100, compile_seconds=45.0)
    assert run.allowance(compiles=True) == 45
    assert 100 < run.allowance(compiles=False) < 106
    run.end, run.quick = time.perf_counter() + 0.1, False
    assert run.allowance(compiles=True) < 6 and run.budget(8).at_least == 2
    options = kernels_args.parse(["--device", "cpu", "--quick", "--op", "stem", "--minutes", "3"])
    started = kernels.start(options, {}, 7.0)
    assert (started.end, started.compile_seconds) == (187.0, kernels.COMPILE_SECONDS["cpu"])
