"""``python -m bench ops``: the plan, the check before the timing, records, the command line."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from bench import workloads
from bench.__main__ import main as bench
from bench.ops import entries, plan, session
from bench.ops.output import furthest
from bench.ops.plan import Request, make_plan
from bench.providers import registry as providers
from bench.records import files
from bench.records.environment import cpu_name, slug
from bench.records.record import Measurement, read_records
from hia_kernels.core import native

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
    flops=10,
    bytes=20,
    roofline_ms=0.5,
    percent_of_roofline=25.0,
    peak_bytes=7,
    extra={"error": 1e-7},
    environment={"device": "a CPU", "commit": None, "dirty": False},
)


def workload(op, case, role=""):
    return workloads.Workload(op, workloads.CASES[case], role)


class Wrong(providers.Eager):
    name = "wrong"

    def bind(self, *args, **kwargs):
        bound = super().bind(*args, **kwargs)
        forward = bound.forward
        bound.forward = lambda: tuple(out * 1.01 for out in forward())
        return bound


class Raises(providers.Eager):
    name = "raises"

    def bind(self, *args, **kwargs):
        raise RuntimeError("a broken package\nwith a second line")


class Absent(providers.Eager):
    name = "absent"

    def unavailable_reason(self, *args):
        return "not installed"


def know(monkeypatch, found):
    """Make these the providers."""
    for module in (plan, session):
        monkeypatch.setattr(module, "all_providers", lambda: {provider.name: provider for provider in found})


@pytest.fixture
def with_fakes(monkeypatch):
    know(monkeypatch, [providers.Ours(), Wrong(), Raises(), Absent()])


@pytest.mark.usefixtures("with_fakes")
def test_a_peer_that_fails_is_a_red_row_and_absence_a_reason(tmp_path, capsys):
    path = tmp_path / "records.json"
    arguments = ["--quick", "--device", "cpu", "--op", "inject_rows", "--case", "tiny", "--mode", "forward"]
    assert bench(["ops", *arguments, "--json", str(path)]) == 0
    found = {record.provider: record for record in read_records(path)}
    assert found["hia"].status == "ok" and found["hia"].extra["backend"] == "cpu"
    assert found["hia"].p20_ms <= found["hia"].p50_ms <= found["hia"].p80_ms
    assert found["hia"].percent_of_roofline == pytest.approx(100 * found["hia"].roofline_ms / found["hia"].p50_ms)
    assert found["wrong"].status == "failed" and found["wrong"].p50_ms is None
    assert re.match(r"beyond the tolerance: out0: \d+ of \d+ elements beyond", found["wrong"].reason)
    assert found["raises"].reason == "RuntimeError: a broken package"
    assert (found["absent"].status, found["absent"].reason) == ("unavailable", "not installed")
    printed = capsys.readouterr()
    assert "FAILED" in printed.out and "unavailable  absent: not installed (1 rows)" in printed.out
    *_, first, second, last = printed.out.strip().splitlines()
    assert first.startswith("a peer failed  wrong: beyond the tolerance: out0: ")
    assert second == "a peer failed  raises: RuntimeError: a broken package (1 rows)" and "written: " in last
    assert "Traceback" not in printed.out + printed.err and printed.err == ""


class OursWrong(Wrong):
    name = "hia-reference"


@pytest.mark.parametrize(
    ("who", "code", "line"),
    [
        ([OursWrong(), providers.Eager()], 1, "failed  hia-reference: beyond the tolerance"),
        ([Raises(), Absent()], 1, "a peer failed  raises: RuntimeError: a broken package (1 rows)"),
        ([Raises(), providers.Eager()], 0, "a peer failed  raises: RuntimeError: a broken package (1 rows)"),
        ([Absent()], 1, "unavailable  absent: not installed (1 rows)"),
    ],
    ids=["ours-fails", "nobody-ran", "a-peer-fails", "nobody-is-here"],
)
def test_the_exit_code_is_about_ours(who, code, line, monkeypatch, capsys):
    know(monkeypatch, who)
    arguments = ["--quick", "--device", "cpu", "--op", "inject_rows", "--case", "tiny", "--mode", "forward"]
    assert bench(["ops", *arguments]) == code
    assert any(printed.startswith(line) for printed in capsys.readouterr().out.splitlines())


def test_ctrl_c_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    run = session.Measuring.run

    def interrupted(self):
        if self.task.workload.role == "inject":
            raise KeyboardInterrupt
        run(self)

    monkeypatch.setattr(session.Measuring, "run", interrupted)
    arguments = ["--quick", "--device", "cpu", "--op", "cross_attention", "--case", "tiny", "--mode", "dispatch"]
    assert bench(["ops", *arguments, "--provider", "hia,eager", "--out", str(tmp_path)]) == 130
    found = read_records(tmp_path / "kernels.json")
    assert {(record.case, record.provider) for record in found} == {("tiny:extract", "hia"), ("tiny:extract", "eager")}
    assert all(record.mode == "dispatch" and record.roofline_ms is None for record in found)
    assert "interrupted" in capsys.readouterr().out


def test_every_provider_but_the_compiled_passes_on_tiny_shapes(tmp_path):
    """Ops both ways and composites; what can't run here says why."""
    path = tmp_path / "records.json"
    arguments = ["--quick", "--device", "cpu", "--case", "tiny-released,px-tiny:stage1-expand", "--json", str(path)]
    assert bench(["ops", *arguments, "--mode", "forward,both"]) == 0
    found = read_records(path)
    assert {record.op for record in found} == set(workloads.ops() + workloads.composites()) - {
        "stem",
        "encode",
        "encode_train_step",
    }
    passed = {record.provider for record in found if record.status == "ok"}
    ours = {"hia", "hia-cpu", "textbook", "gemms"} | ({"hia-native"} if not native.cpu_unavailable_reasons() else set())
    assert passed == ours | {"eager", "released", "channels_last", "sdpa_math", "sdpa_flash"}
    reasons = {record.provider: record.reason for record in found if record.status == "unavailable"}
    assert reasons["flash_attn_2"] == "flash_attn runs on CUDA only"
    assert all(record.environment["commit"] is not None for record in found)


def test_the_training_step_of_both_encoders_beside_plain_modules(tmp_path):
    """Ours and plain PyTorch in both layouts have one result and one gradient; the port is of ResNet-50 alone."""
    path = tmp_path / "records.json"
    arguments = ["--device", "cpu", "--op", "encode_train_step", "--case", "px-tiny,strided-tiny", "--mode", "both"]
    assert bench(["ops", *arguments, "--quick", "--json", str(path)]) == 0
    found = {(record.case, record.provider): record for record in read_records(path)}
    for case in ("px-tiny", "strided-tiny"):
        assert {found[case, name].status for name in ("hia", "eager", "plain", "plain_channels_last")} == {"ok"}
    assert found["px-tiny", "released"].status == "ok"
    assert found["strided-tiny", "released"].reason == "its encoder is ResNet-50"


def test_results_go_where_git_does_not_look_unless_they_are_records(capsys):
    arguments = ["--quick", "--device", "cpu", "--op", "inject_rows", "--mode", "forward", "--provider", "eager"]
    assert bench(["ops", *arguments]) == 0
    own, committed = (folder / slug(cpu_name()) / "kernels.json" for folder in (files.OUT, files.RESULTS))
    assert own.exists() and not committed.exists() and str(own) in capsys.readouterr().out
    assert bench(["ops", *arguments, "--record", "--provider", "hia"]) == 0
    assert {record.provider for record in read_records(committed)} == {"eager", "hia"}
    assert {record.provider for record in read_records(own)} == {"eager"}
    assert read_records(own)[0].environment["command"] == "python -m bench ops " + " ".join(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "cross_atention"], "--op: must be among .* got 'cross_atention'; did you mean cross_attention"),
        (["--case", "13b-986"], "--case: must be one of .* got '13b-986'; did you mean .*13b-896"),
        (["--provider", "flash_atn_2"], "got 'flash_atn_2'; did you mean flash_attn_2"),
        (["--dtype", "bf15"], "--dtype: must be among fp32, bf16, fp16, got 'bf15'; did you mean bf16"),
        (["--mode", "forwards"], "did you mean forward"),
        (["--device", "gpu"], "--device: must be among auto, cpu, cuda, got 'gpu'"),
        (["--op", "stem", "--case", "tiny"], "--case: must name shapes of stem, got tiny"),
        (["--op", "encode", "--mode", "backward"], "--mode: must be one that the chosen ops and cases have"),
        (["--minutes", "0"], "--minutes: must be more than 0, got 0"),
        (["--op", ","], "--op: must name at least one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_names_what_is_near(arguments, message, capsys):
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert bench(["ops", *device, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench ops: --")
    assert "Traceback" not in error
    assert re.search(message, error.replace("\n", " ")), error


def test_cuda_without_a_device_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(["ops", "--device", "cuda"]) == 2
    assert "cuda needs a CUDA device" in capsys.readouterr().err


def test_list_on_a_fake_gpu(capsys, monkeypatch):
    """The plan for a CUDA device is made without one: nothing is drawn, nothing is run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench(["ops", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "cross_attention  13b-896-2img:extract  bf16  forward,backward,both" in printed
    assert "flash_attn_3" in printed and "stem  px-tiny  bf16  dispatch" in printed
    assert printed.strip().endswith("workloads on cuda")


def test_a_library_that_refuses_is_unavailable_and_says_why():
    found = entries.refusal(RuntimeError("No available kernel. Aborting execution."), ["head_dim too large (Triggered"])
    assert found == {"status": "unavailable", "reason": "No available kernel. Aborting execution. head_dim too large"}
    assert entries.refusal(ValueError("boom"), ["w"]) == {"status": "failed", "reason": "ValueError: boom"}


def test_ours_has_no_input_to_refuse(monkeypatch):
    monkeypatch.delenv("HIA_BACKEND", raising=False)
    raised = NotImplementedError("hia::stem: 40 channels are not supported")
    for name in ("hia", "textbook"):
        found = entries.refusal(raised, [], name)
        assert found == {"status": "failed", "reason": f"NotImplementedError: {raised}"}
        assert entries.refusal(RuntimeError("dtype not supported"), [], name)["status"] == "failed"
    assert entries.refusal(raised, [], "hia-triton")["status"] == "unavailable"
    monkeypatch.setenv("HIA_BACKEND", "triton")
    assert entries.refusal(raised, [], "hia")["status"] == "unavailable"


def test_furthest_takes_the_fastest_provider_of_each_workload():
    slow = replace(RECORD, provider="eager", p20_ms=9.0, p50_ms=9.0, p80_ms=9.0, percent_of_roofline=1.0)
    other = replace(RECORD, case="px448", percent_of_roofline=10.0)
    assert furthest([slow, RECORD, other]) == [other, RECORD]


def test_the_most_telling_shapes_come_first_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    everyone = providers.all_providers()
    tasks = make_plan(Request()).tasks()
    assert tasks[0].workload.case.name in workloads.FIRST and tasks[0].workload.level == "composite"
    compiling = [all(everyone[name].compiles for name in task.providers) for task in tasks]
    assert compiling == sorted(compiling), "compiling comes last"
    compiled = tasks[compiling.index(True) :]
    assert {task.workload.case.name for task in compiled} == set(workloads.FIRST)
    for workload in {task.workload for task in tasks}:
        asked = [name for task in tasks if task.workload == workload for name in task.providers]
        assert sorted(asked) == sorted(everyone), "each once, measured or with a reason"
        assert plan.too_slow_to_compile("cuda", workload) is (workload not in {t.workload for t in compiled})


def test_composites_and_896_pixels_come_early_on_the_cpu():
    for asked in ({}, {"op": ["inject_rows,adapter_layer"], "case": ["13b-448", "13b-896"]}):
        found = [workload for workload, _ in make_plan(Request(device="cpu", **asked)).steps]
        levels = [found.level for found in found if "896" in found.case.name] or [one.level for one in found]
        assert set(levels) == {"op", "composite"} and levels == sorted(levels)  # "composite" < "op"
    assert ["896" in one.case.name for one in found] == [True, True, False, False]


def test_no_new_task_after_the_time_is_over(tmp_path, capsys):
    arguments = ["--quick", "--device", "cpu", "--op", "stem,inject_rows", "--minutes", "1e-9"]
    assert bench(["ops", *arguments, "--out", str(tmp_path)]) == 1, "nothing was measured"
    assert not (tmp_path / "kernels.json").exists(), "nothing replaces no record"
    assert "not measured, out of time: stem px-tiny fp32" in capsys.readouterr().out


def test_a_reference_that_raises_is_a_red_row(tmp_path, monkeypatch, capsys):
    def out_of_memory(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nmore")

    monkeypatch.setattr(entries, "truth_of", out_of_memory)
    path = tmp_path / "records.json"
    arguments = ["--quick", "--device", "cpu", "--op", "stem", "--mode", "forward", "--json", str(path)]
    assert bench(["ops", *arguments]) == 1
    (found,) = read_records(path)
    assert (found.provider, found.status) == ("reference", "failed")
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 80 GiB" in found.reason
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.compile
def test_compiled_providers_are_right(tmp_path):
    if providers.compiler_missing("cpu") is not None:
        pytest.skip(providers.compiler_missing("cpu"))
    path = tmp_path / "records.json"
    arguments = ["--device", "cpu", "--op", "condition_queries", "--case", "tiny", "--provider", "compile"]
    assert bench(["ops", *arguments, "--mode", "forward,backward", "--json", str(path)]) == 0
    assert {record.mode for record in read_records(path)} == {"forward", "backward"}
