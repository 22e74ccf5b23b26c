"""``python -m bench ops`` cut short: by its end, by a device that fails, by what was there before."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from bench import workloads
from bench.__main__ import main as bench
from bench.measure.roofline import Limits
from bench.measure.timing import cpu_clock
from bench.measure.worker import DeviceFailed, Failure, Inline, Isolated
from bench.ops import collect, entries, run, session
from bench.ops.collect import Collected
from bench.ops.plan import Request, Task, make_plan
from bench.ops.session import Session, Settings
from bench.progress import Progress
from bench.providers import registry as providers
from bench.records.record import Measurement, read_records, write_records
from bench.records.store import Store
from tests.bench.test_ops import know

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
LIMITS = Limits(1e9, {"fp32": 1e9})
STEM = workloads.Workload("stem", workloads.CASES["px-tiny"])
INJECT = workloads.Workload("inject_rows", workloads.CASES["tiny"])


def task(workload, *modes, who=("hia", "breaks", "eager")) -> Task:
    return Task(workload, modes or ("forward",), "fp32", tuple(who))


def collected(*tasks, settings=None, known=None) -> Collected:
    """Run the tasks in this process."""
    found = Collected({}, Progress(len(tasks)))
    settings = settings or Settings("cpu", ("fp32",), quick=True)
    worker = Inline(known or (lambda: Session(settings, LIMITS)))
    for one in tasks:
        collect.run_task(one, settings, worker, found)
    return found


def by_key(found: Collected) -> dict:
    return {(one.op, one.mode, one.provider): (one.status, one.reason) for one in found.records}


def test_who_is_left_out_of_compiling_says_so():
    settings = Settings("cuda", ("bf16",), saves_time=True)
    compiled = providers.all_providers()["compile"]
    measuring = session.Measuring(settings, LIMITS, cpu_clock, None, task(STEM), [compiled])
    for case, reason in (
        ("px4096", "left out to save time where nothing was asked for by name"),
        ("px896", providers.compiler_missing("cuda")),
    ):
        subject = entries.Subject(workloads.Workload("stem", workloads.CASES[case]), "bf16", {}, None)
        assert measuring.unavailable_reason(compiled, subject, "forward") == reason


class Breaks(providers.Eager):
    """Makes the device fail, in its work alone: a fresh process works again."""

    name = "breaks"
    broken = False

    def bind(self, *args, **kwargs):
        type(self).broken = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")


@pytest.fixture
def breaking(monkeypatch):
    """A device as after an illegal access: the next wait raises, and so would all that follow in the process."""

    def synchronize(_device):
        if Breaks.broken:
            Breaks.broken = False
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(session, "synchronize", synchronize)
    know(monkeypatch, [providers.Ours(), Breaks(), providers.Eager()])


@pytest.mark.usefixtures("breaking")
def test_a_device_that_fails_is_one_failure():
    """The task is run again without the provider in whose work it failed, and the next ones with it."""
    found = collected(task(STEM, "forward", "backward"), task(INJECT, who=("hia", "eager")))
    why = "the device failed (CUDA error: an illegal memory access was encountered) in breaks stem px-tiny"
    assert found.failures == [why] and found.cut
    rows = by_key(found)
    assert rows.pop(("stem", "forward", "breaks")) == ("failed", why)
    assert rows.pop(("stem", "backward", "breaks")) == ("unavailable", f"not run: {why}")
    assert set(rows) == {
        *(("stem", mode, name) for mode in ("forward", "backward") for name in ("hia", "eager")),
        *(("inject_rows", "forward", name) for name in ("hia", "eager")),
    }
    assert set(rows.values()) == {("ok", None)}


def test_a_device_that_fails_while_it_is_timed(monkeypatch):
    """The provider whose call raised first is to blame; the others are measured again."""
    calls, broken = [], [True]

    class Counts(providers.Eager):
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
        if broken and len(calls) > 4:
            raise RuntimeError("CUDA error: misaligned address")
        return cpu_clock(call, times)

    def synchronize(_device):
        if broken and len(calls) > 4:
            broken.clear()
            raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(session, "synchronize", synchronize)
    know(monkeypatch, [providers.Ours(), Counts(), providers.Eager()])
    own = Session(Settings("cpu", ("fp32",), quick=True, seconds=0.1), LIMITS)
    own.clock = clock
    found = collected(task(INJECT), known=lambda: own)
    (failed,) = [one.provider for one in found.records if one.status == "failed"]
    assert found.failures == [f"the device failed (CUDA error: misaligned address) in {failed} inject_rows tiny"]
    assert {one.provider for one in found.records if one.status == "ok"} == {"hia", "breaks", "eager"} - {failed}


def test_a_reference_that_breaks_the_device_ends_its_task_alone(monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("CUDA error: device-side assert triggered")

    def synchronize(_device):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(entries, "truth_of", broken)
    monkeypatch.setattr(session, "synchronize", synchronize)
    found = collected(task(STEM, "forward", "backward", who=("hia", "eager")))
    assert [(one.provider, one.mode, one.status) for one in found.records] == [
        ("reference", "forward", "failed"),
        ("reference", "backward", "unavailable"),
    ]


@pytest.mark.usefixtures("breaking")
def test_a_failed_device_is_in_the_record_and_the_rest_too(tmp_path, monkeypatch, capsys):
    arguments = [
        "ops",
        "--quick",
        "--device",
        "cpu",
        "--op",
        "inject_rows",
        "--mode",
        "forward",
        "--out",
        str(tmp_path),
    ]
    assert bench(arguments) == 0, "a peer that breaks the device is a red row like any other"
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "a peer failed  breaks: the device failed (CUDA error: an illegal memory access" in printed
    assert "in breaks inject_rows tiny: the rest went on without it" in printed
    found = {one.provider: one.status for one in read_records(tmp_path / "kernels.json")}
    assert found == {"hia": "ok", "eager": "ok", "breaks": "failed"}
    Breaks.name = "hia-triton"
    try:
        know(monkeypatch, [providers.Ours(), Breaks(), providers.Eager()])
        assert bench(arguments) == 1
    finally:
        Breaks.name = "breaks"


def test_a_run_in_a_process_of_its_own_finds_the_same(tmp_path, monkeypatch):
    """Tasks, limits and rows pass between the processes, as on a GPU."""
    monkeypatch.setattr(collect, "Inline", Isolated)
    arguments = ["ops", "--quick", "--device", "cpu", "--op", "inject_rows,second_question", "--case", "tiny"]
    arguments += ["--mode", "forward", "--provider", "hia,eager,flash_attn_2"]
    assert bench([*arguments, "--json", str(tmp_path / "own.json"), "--out", str(tmp_path)]) == 0
    found = read_records(tmp_path / "own.json")
    assert {(one.op, one.provider, one.status) for one in found} == {
        (op, provider, "ok") for op in ("inject_rows", "second_question") for provider in ("hia", "eager")
    }
    (facts,) = {str(one.environment) for one in found}
    assert "gemm_gflop_per_s" in facts and "python -m bench ops --quick" in facts


def test_who_crashes_twice_is_left_out_twice():
    """A worker that dies: each time the provider at work is left out, until nobody is."""
    asked = []

    class Dies:
        def run(self, one, _channel):
            asked.append(one.providers)
            return Failure("its process was ended by SIGSEGV", one.providers[-1])

    found = Collected({}, Progress(1))
    collect.run_task(task(INJECT), Settings("cpu", ("fp32",)), Dies(), found)
    assert asked == [("hia", "breaks", "eager"), ("hia", "breaks"), ("hia",)]
    assert by_key(found)["inject_rows", "forward", "eager"] == (
        "failed",
        "its process was ended by SIGSEGV in eager inject_rows tiny",
    )
    assert task(INJECT).without("the reference") is None and task(INJECT, who=("hia",)).without("hia") is None


def test_a_gradient_reference_that_raises_leaves_the_forward_alone(tmp_path, monkeypatch):
    truth_of = entries.truth_of

    def without_gradients(*args, gradients):
        if gradients:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return truth_of(*args, gradients=gradients)

    monkeypatch.setattr(entries, "truth_of", without_gradients)
    arguments = ["--quick", "--device", "cpu", "--op", "stem", "--mode", "forward,backward,both", "--provider", "hia"]
    assert bench(["ops", *arguments, "--out", str(tmp_path)]) == 1
    found = [(one.provider, one.mode, one.status) for one in read_records(tmp_path / "kernels.json")]
    assert found == [("hia", "forward", "ok"), ("reference", "backward", "failed"), ("reference", "both", "failed")]


def test_a_partial_run_adds_to_the_record_and_a_whole_one_replaces_it(tmp_path):
    absent = {"status": "unavailable", "reason": "no", "p20_ms": None, "p50_ms": None, "p80_ms": None}
    old, other = replace(RECORD, p20_ms=9.0, p50_ms=9.0, p80_ms=9.0), replace(RECORD, provider="eager")
    path, own = tmp_path / "kernels.json", tmp_path / "own.json"
    for one in (path, own):
        write_records(one, [old, other, replace(RECORD, case="px448", **absent)])
    store = Store([path, own], own=[own])
    new = [RECORD, replace(other, **absent), replace(RECORD, case="px448", **{**absent, "reason": "why"})]
    store.save(new)
    found = {(one.provider, one.case): one for one in read_records(path)}
    assert found["hia", "px224"] == RECORD and found["eager", "px224"] == other, "no number is lost to a reason"
    assert found["hia", "px448"].reason == "why" and len(found) == 3
    assert read_records(own) == new
    assert {one.key for one in store.all(new)} == {one.key for one in found.values()}
    store.save([])
    assert read_records(own) == new, "nothing replaces no record"
    store.save(new[:1], complete=True)
    assert read_records(path) == new[:1]


@pytest.mark.parametrize("content", [b"[1", b"\xff\xfe", b'{"format": 9}'])
def test_a_broken_record_of_before_is_named(content, tmp_path, capsys):
    (tmp_path / "kernels.json").write_bytes(content)
    assert bench(["ops", "--quick", "--device", "cpu", "--op", "stem", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"bench ops: --out: {tmp_path / 'kernels.json'} must hold the records of an earlier run, got: "
    )
    assert "move it away, or name another folder" in error and "Traceback" not in error
    assert (tmp_path / "kernels.json").read_bytes() == content


def test_what_begins_late_does_not_overshoot(monkeypatch):
    class Slow(providers.Eager):
        name, compiles = "slow", True

        def bind(self, *args, **kwargs):
            time.sleep(30)

    monkeypatch.setattr(session, "LATE_S", 0.1)
    know(monkeypatch, [providers.Ours(), Slow(), providers.Eager()])
    began = time.monotonic()
    settings = Settings("cpu", ("fp32",), quick=True, end=began + 1.5)
    found = collected(task(INJECT, "forward", "both", who=("hia", "slow", "eager")), settings=settings)
    assert 1.4 < time.monotonic() - began < 10 and found.cut
    assert {(one.status, one.reason) for one in found.records} == {("unavailable", entries.OVER)}
    assert len(found.records) == 6


def test_a_run_with_an_end_limits_what_compiles():
    settings = Settings("cpu", ("fp32",))
    assert settings.allowance(compiles=True) is None and settings.budget(8).at_least == 4
    settings = replace(settings, end=time.monotonic() + 100, compile_seconds=45.0)
    assert settings.allowance(compiles=True) == 45
    assert 100 < settings.allowance(compiles=False) < 106
    settings = replace(settings, end=time.monotonic() + 0.1)
    assert settings.allowance(compiles=True) < 6 and settings.budget(8).at_least == 2
    plan = make_plan(Request(device="cpu", quick=True, op=["stem"]))
    settings = run.settings_of(plan, 3, 7.0)
    assert (settings.end, settings.compile_seconds) == (187.0, run.COMPILE_SECONDS["cpu"])


def test_the_device_is_waited_for_after_each_provider(monkeypatch):
    """Else the failure of one would be found in the next one's work."""
    waits = []
    monkeypatch.setattr(session, "synchronize", lambda device: waits.append(device))
    collected(task(INJECT, who=("hia", "eager")))
    assert len(waits) == 2 + 2 + 1 + 1, "checked, prepared, timed, and the end"
    with pytest.raises(DeviceFailed, match=r"the device failed \(gone\)"):
        monkeypatch.setattr(session, "synchronize", lambda device: (_ for _ in ()).throw(RuntimeError("gone\nmore")))
        session.Measuring(Settings("cpu", ()), LIMITS, cpu_clock, None, task(INJECT), []).check_device()
