"""Interleaving, percentiles, noise, limits and memory of the benchmark's clock; where a number was made."""

from __future__ import annotations

import gc
import os
import subprocess
import weakref
from types import SimpleNamespace

import pytest
import torch

from bench.measure import roofline as limits
from bench.measure import timing
from bench.measure.timing import Budget, Samples, interleaved
from bench.records import environment


def recording(order, name, cost=0.0):
    def call():
        order.append(name)

    call.cost = cost
    return call


def test_repetitions_take_turns():
    order = []
    calls = {name: recording(order, name) for name in "AB"}
    found = interleaved(calls, lambda call, times: (call(), 1.0)[1], Budget(0.0, at_least=3), shortest_ms=0.0)
    assert order[4:] == ["A", "B"] * 3, "the four before are the warm-up"
    assert {name: samples.times_ms for name, samples in found.items()} == {"A": [1.0] * 3, "B": [1.0] * 3}


def test_stops_when_the_time_is_over_but_never_below_the_least():
    seconds = iter(range(100))
    found = interleaved(
        {"A": lambda: None}, lambda call, times: 1.0, Budget(7.0, at_least=2, at_most=50), now=lambda: next(seconds)
    )
    assert len(found["A"].times_ms) == 9  # two unasked, then one a second up to the seventh
    few = interleaved({"A": lambda: None}, lambda call, times: 1.0, Budget(0.0, at_least=4, at_most=50))
    many = interleaved({"A": lambda: None}, lambda call, times: 1.0, Budget(60.0, at_least=4, at_most=5))
    assert len(few["A"].times_ms) == 4 and len(many["A"].times_ms) == 5


def test_short_calls_are_repeated_within_a_repetition():
    times = []

    def clock(call, count):
        times.append(count)
        return 0.01

    interleaved({"A": lambda: None}, clock, Budget(0.0, at_least=1, at_most=1), shortest_ms=0.5)
    assert times == [1, 1, 50]


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, MemoryError, AssertionError])
def test_a_call_that_raises_leaves_the_others_alone(kind):
    def broken():
        raise kind("no")

    found = interleaved({"A": broken, "B": lambda: None}, timing.cpu_clock, Budget(0.0, at_least=2), shortest_ms=0.0)
    assert str(found["A"].error) == "no" and found["A"].times_ms == []
    assert found["B"].error is None and len(found["B"].times_ms) == 2


def test_ctrl_c_and_a_time_limit_end_all_of_them():
    for error in (KeyboardInterrupt, timing.OutOfTime):

        def ended(error=error):
            raise error

        with pytest.raises(error):
            interleaved({"A": ended, "B": lambda: None}, timing.cpu_clock, Budget(0.0, at_least=2), shortest_ms=0.0)


def test_percentiles():
    samples = Samples([5.0, 1.0, 3.0, 2.0, 4.0])
    assert [samples.percentile(p) for p in (0, 20, 50, 80, 100)] == pytest.approx([1, 1.8, 3, 4.2, 5])
    assert Samples([7.0]).percentile(80) == 7


@pytest.mark.parametrize(
    ("times", "noisy"),
    [([10, 10, 11, 11], False), ([10, 10, 11.6, 11.6], True), ([11.6, 11.6, 10, 10], True), ([10], True)],
    ids=["10-percent", "16-percent", "faster", "one"],
)
def test_noisy_above_15_percent_between_the_halves(times, noisy):
    assert Samples([float(time) for time in times]).noisy is noisy


def test_tf32_is_off_inside_and_restored():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with timing.exact_matmuls():
            assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_roofline_is_the_slower_of_memory_and_arithmetic():
    found = limits.Limits(bandwidth=1e9, rates={"fp32": 1e12})
    assert found.roofline_ms(flops=10**9, moved=10**7, dtype="fp32") == pytest.approx(10.0)
    assert found.roofline_ms(flops=10**11, moved=10**7, dtype="fp32") == pytest.approx(100.0)
    assert found.to_dict() == {"bandwidth_gb_per_s": 1.0, "gemm_gflop_per_s": {"fp32": 1000.0}}


def test_limits_of_this_machine_are_plausible():
    found = limits.measure("cpu", ("fp32", "bf16"), quick=True)
    assert 1e8 < found.bandwidth < 1e13
    assert 1e8 < found.rates["fp32"] < 1e14 and found.rates["bf16"] > 0


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of one commit, taken for ours."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    for name in ("code.py", "bench/results/a-cpu/kernels.json", "docs/benchmarks/index.html", "docs/stem.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    return tmp_path


def test_the_commit_of_copied_files_can_be_named(monkeypatch):
    """A machine that got the files without their repository, or with an old one, can't know it."""
    monkeypatch.setenv("BENCH_COMMIT", "0123abc")
    assert environment.revision() == {"commit": "0123abc", "dirty": False, "commit_from": "BENCH_COMMIT"}
    monkeypatch.setenv("BENCH_COMMIT", "main")
    with pytest.raises(ValueError, match="BENCH_COMMIT must be a commit's hash, got 'main'"):
        environment.revision()
    monkeypatch.setenv("BENCH_COMMIT", "")
    assert environment.revision()["commit"] != "0123abc"


def test_records_of_an_earlier_step_are_no_uncommitted_changes(checkout):
    assert environment.describe("cpu")["dirty"] is False
    (checkout / "bench" / "results" / "a-cpu" / "kernels.json").write_text("after")
    (checkout / "bench" / "results" / "another-cpu").mkdir()
    (checkout / "bench" / "results" / "another-cpu" / "table3.json").write_text("new")
    (checkout / "docs" / "benchmarks" / "a-cpu.md").write_text("new")
    assert environment.describe("cpu")["dirty"] is False


@pytest.mark.parametrize("name", ["code.py", "docs/stem.md", "bench/new.py", "results.json"])
def test_anything_else_is(checkout, name):
    (checkout / name).write_text("after")
    assert environment.describe("cpu")["dirty"] is True


def test_outside_a_repository_nobody_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    assert environment.dirty() is None


@pytest.mark.skipif(os.name == "nt", reason="NO SHELL: the stand-in for nvidia-smi is a shell script")
@pytest.mark.parametrize(
    ("answer", "driver", "power"),
    [
        ("580.65.06, 700.00", "580.65.06", 700.0),
        ("580.65.06, [N/A]", "580.65.06", None),
        ("[Not Supported], 350.00", None, 350.0),
        ("580.65.06", "580.65.06", None),
        ("", None, None),
    ],
    ids=["both", "no-power-limit", "no-driver", "one-field", "nothing"],
)
def test_driver_and_power_limit_are_read_separately(answer, driver, power, tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n[ \"$2\" = GPU-1234 ] && echo '{answer}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = environment._gpu_facts(SimpleNamespace(uuid="1234"))
    assert found == {"driver": driver, "power_limit_w": power}


def test_no_nvidia_smi_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._gpu_facts(SimpleNamespace()) == {"driver": None, "power_limit_w": None}


class FakeEvents:
    """A stream that writes down what is queued on it; each stretch between two events takes 6 ms."""

    def __init__(self, monkeypatch):
        self.order = []
        recorded = self.order

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                recorded.append("event")

            def elapsed_time(self, end):
                recorded.append("read")
                return 6.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: recorded.append("wait"))

    def clock(self, fill_ms):
        clock = object.__new__(timing.CudaClock)  # there may be no device to hold its cache
        clock._cache = SimpleNamespace(zero_=lambda: self.order.append("flush"))
        clock._queued, clock._fill_ms = weakref.WeakKeyDictionary(), fill_ms
        return clock


def test_a_repetition_on_cuda_is_cold_and_waited_for(monkeypatch):
    """The order on the stream: the write that empties L2, the calls between two events, a wait before the read."""
    events = FakeEvents(monkeypatch)
    clock = events.clock(1000.0)
    assert clock(lambda: events.order.append("call"), 3) == 2.0
    assert events.order == ["flush", "event", "call", "call", "call", "event", "wait", "read"]


def test_the_device_is_busy_as_long_as_the_host_needs_to_queue(monkeypatch):
    """Else the time of a short kernel would be that of its launch."""
    events, now = FakeEvents(monkeypatch), [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    clock = events.clock(0.125)

    def call():
        now[0] += 0.4e-3

    clock(call, 1)
    assert events.order.count("flush") == 1 and clock.queued_ms(call) == pytest.approx(0.4)
    clock(call, 2)
    assert events.order.count("flush") == 1 + 1 + 10  # one empties L2, ten take 1.5 times what two calls do
    assert not clock.is_host_bound(call, 2)


def test_what_the_host_can_not_be_ahead_of_is_timed_as_it_is(monkeypatch):
    """Writes that hide a part of the host's time would leave a time that is nobody's."""
    events, now = FakeEvents(monkeypatch), [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    clock = events.clock(0.125)

    def call():
        now[0] += 0.1

    clock(call, 1)
    assert clock.queued_ms(call) == pytest.approx(100) and clock.is_host_bound(call)
    clock(call, 1)
    assert events.order.count("flush") == 2


def test_the_clock_keeps_no_call_alive(monkeypatch):
    """A call holds its inputs, on the device."""
    clock = FakeEvents(monkeypatch).clock(1.0)

    def call():
        return None

    clock(call, 1)
    gone = weakref.ref(call)
    del call
    gc.collect()
    assert gone() is None and len(clock._queued) == 0


def test_dispatch_waits_before_and_after(monkeypatch):
    """The device is idle when the first call is queued, and what was queued is no part of the next measurement."""
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(timing, "cpu_clock", lambda call, times: order.append(times) or 1.0)
    assert timing.DispatchClock("cuda")(lambda: None, 1000) == 1.0
    assert order == ["wait", 100, "wait"]
