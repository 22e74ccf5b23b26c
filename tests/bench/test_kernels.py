"""``python -m bench ops``: cases, providers, the gate, records, the command line."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import pytest
import torch

import bench.ops.run as kernels
from bench import workloads
from bench.measure import accuracy, costs
from bench.ops import options as kernels_args
from bench.ops import output as kernels_output
from bench.providers import layers as composites
from bench.providers import peers
from bench.providers import registry as providers
from bench.records import environment
from bench.records.record import Measurement, read_records, write_records
from hia_kernels.core import native
from hia_kernels.testing import UNIT_ROUNDOFF, rel_rms

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


def test_records_survive_a_file(tmp_path):
    red = replace(RECORD, provider="other", status="failed", reason="no", p20_ms=None, p50_ms=None, p80_ms=None)
    path = write_records(tmp_path / "deep" / "kernels.json", [RECORD, red])
    assert read_records(path) == [RECORD, red]
    assert [file.name for file in path.parent.iterdir()] == ["kernels.json"], "no partial file is left"
    assert len(json.loads(path.read_text())["environments"]) == 1
    write_records(path, [red])
    assert read_records(path) == [red], "nothing is merged"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "sideways"}, "mode must be forward or backward or both or dispatch, got 'sideways'"),
        ({"p50_ms": None}, "status 'ok' must have p20_ms, p50_ms, p80_ms and no reason"),
        ({"status": "failed"}, "status 'failed' must have a reason and no times"),
        ({"flops": -1}, "flops must be a whole number of at least 0, got -1"),
        ({"p80_ms": float("nan")}, "p80_ms must be a number of at least 0, got nan"),
        ({"op": ""}, "op must be a name, got ''"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_records_are_checked(changes, message):
    with pytest.raises(ValueError) as error:
        replace(RECORD, **changes)
    assert message in str(error.value)


def test_files_that_hold_something_else(tmp_path):
    values = RECORD.to_dict()
    with pytest.raises(ValueError, match=r"got unknown \['speed'\], missing \['op'\]"):
        Measurement.from_dict({name: value for name, value in values.items() if name != "op"} | {"speed": 1})
    path = tmp_path / "kernels.json"
    path.write_text("[1")
    with pytest.raises(ValueError, match="must be a JSON file"):
        read_records(path)
    path.write_text('{"format": 9}')
    with pytest.raises(ValueError, match="must hold an object of format 1, got 9"):
        read_records(path)
    path.write_text('{"format": 1, "environments": [], "records": [{"environment": 0}]}')
    with pytest.raises(ValueError, match="record 0"):
        read_records(path)


def test_the_named_shapes_are_the_real_ones():
    case = workloads.CASES["13b-896-2img-b4"]
    assert (case.hidden_size, case.batch, case.images, case.seq_len) == (5120, 4, 8, 2 * 576 + 60)
    assert case.feature_lengths == [28 * 28] * 8 and case.config.head_dim == 128
    assert workloads.CASES["13b-released-896-2img"].config.head_dim == 640
    assert workloads.CASES["7b-released-448"].config.head_dim == 512
    assert workloads.CASES["lite-4096"].config.dim == 1024 and workloads.CASES["lite-4096"].feature_lengths == [
        128 * 128
    ]
    assert not workloads.CASES["13b-ragged-b4"].is_even
    for host in ("13b", "7b"):
        for side in (448, 896, 1792, 4096):
            assert {f"{host}-{side}", f"{host}-{side}-2img", f"{host}-{side}-b4", f"{host}-{side}-2img-b4"} <= set(
                workloads.CASES
            )


@pytest.mark.parametrize("op", workloads.ops() + workloads.composites())
def test_every_op_has_cases_in_every_set(op):
    for name in ("cpu", "gpu", "quick"):
        assert [found for found in workloads.workloads(op) if workloads.in_set(found, name)], f"{op} has none in {name}"


def test_unknown_op_of_workloads():
    with pytest.raises(ValueError, match="op must be among .*, got 'stemm'"):
        workloads.workloads("stemm")


@pytest.mark.parametrize("role", ["extract", "inject"])
def test_costs_of_attention_are_those_of_its_page(role):
    found = workload("cross_attention", "tiny", role)
    given = workloads.make_inputs(found, torch.float32, "cpu")
    (tq, heads, dim), lk = given["q"].shape, given["max_seqlen_k"]
    product = 2 * tq * lk * heads * dim
    assert costs.flops(found, given, None, "forward") == 2 * product
    assert costs.flops(found, given, None, "backward") == 5 * product
    assert costs.flops(found, given, None, "both") == 7 * product
    tensors = (given["q"].numel() + given["k"].numel()) * 2 * 4
    packing = sum(given[f"cu_seqlens_{name}"].nbytes for name in "qk")
    assert costs.moved_bytes(found, given, None, (), "forward", itemsize=4) == tensors + packing


def test_a_composites_passes_add_up():
    """A backward of products alone is two products for each of the forward's; attention's is five for two."""
    found = workload("inject", "tiny")
    given = workloads.make_inputs(found, torch.float32, "cpu")
    weights = composites.make_weights(found.case, torch.float32, "cpu")
    forward, backward, both = (costs.flops(found, given, weights, mode) for mode in ("forward", "backward", "both"))
    assert forward + backward == both and 2 * forward <= backward <= 2.5 * forward


def test_ragged_attention_is_counted_by_its_lengths():
    found = workload("cross_attention", "tiny-ragged", "extract")
    lengths_q, lengths_k = found.case.attention_lengths("extract")
    given = workloads.make_inputs(found, torch.float32, "cpu")
    exact = 4 * sum(q * k for q, k in zip(lengths_q, lengths_k, strict=True)) * found.case.config.dim
    assert costs.flops(found, given, None, "forward") == exact


def test_second_question_saves_the_encoder():
    counted = {}
    for op in ("encode", "extract", "inject", "second_question", "adapter_layer"):
        found = workloads.Workload(op, workloads.CASES["tiny"])
        given = workloads.make_inputs(found, torch.float32, "cpu")
        weights = composites.make_weights(found.case, torch.float32, "cpu")
        counted[op] = costs.flops(found, given, weights, "forward")
    assert counted["second_question"] == counted["extract"] + counted["inject"]
    assert counted["adapter_layer"] == counted["second_question"] + counted["encode"]


@pytest.mark.parametrize("op", [op for op in workloads.composites() if workloads.entry(op).parts])
def test_released_port_and_ours_agree_on_the_same_weights(op):
    found = workload(op, "tiny-released")
    given = workloads.make_inputs(found, torch.float64, "cpu")
    weights = composites.make_weights(found.case, torch.float64, "cpu")
    outs = []
    for step in (composites.our_step(found.case, weights), composites.released_step(found.case, weights)):
        arguments = composites.arguments_of(step, op, given)
        with torch.no_grad():
            outs.append(getattr(step, op)(**{**arguments, "hidden": given["hidden"].clone()})[0])
    assert rel_rms(outs[1], outs[0]) < 1e-7  # its normalised pixels are fp32
    changed = outs[0].shape == given["hidden"].shape and not torch.equal(outs[0], given["hidden"])
    assert changed or op == "extract", "an injection that does nothing proves nothing"


def test_gate_lets_nothing_wrong_through():
    found = workload("norm_linear", "tiny", "visual")
    given = workloads.make_inputs(found, torch.float32, "cpu")
    truth = accuracy.truth_of(found, given, None, torch.float32, gradients=True)
    bound = providers.Eager().bind(found, given, None, gradients=True)
    problem, error = truth.check(accuracy.results_of(bound, truth.exact, gradients=True))
    assert problem is None and error < 100 * UNIT_ROUNDOFF[torch.float32]
    results = accuracy.results_of(bound, truth.exact, gradients=True)
    problem, _ = truth.check({**results, "dweight": results["dweight"] * 1.001})
    assert re.match(r"dweight: \d+ of \d+ elements beyond 6 roundings of their terms", problem)
    problem, _ = truth.check({name: value for name, value in results.items() if name != "dx"})
    assert problem == "no result for dx"


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


@pytest.fixture
def with_fakes(monkeypatch):
    found = {provider.name: provider for provider in (providers.Ours(), Wrong(), Raises(), Absent())}
    monkeypatch.setattr(kernels, "all_providers", lambda: found)
    monkeypatch.setattr(kernels_args, "all_providers", lambda: found)


@pytest.mark.usefixtures("with_fakes")
def test_a_peer_that_fails_is_a_red_row_and_absence_a_reason(tmp_path, capsys):
    path = tmp_path / "records.json"
    arguments = ["--quick", "--device", "cpu", "--op", "inject_rows", "--case", "tiny", "--mode", "forward"]
    assert kernels.main([*arguments, "--json", str(path)]) == 0
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
    for module in (kernels, kernels_args):
        monkeypatch.setattr(module, "all_providers", lambda: {one.name: one for one in who})
    arguments = ["--quick", "--device", "cpu", "--op", "inject_rows", "--case", "tiny", "--mode", "forward"]
    assert kernels.main(arguments) == code
    assert any(printed.startswith(line) for printed in capsys.readouterr().out.splitlines())


def test_ctrl_c_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    measure = kernels.measure_workload

    def interrupted(run, found, *rest):
        if found.role == "inject":
            raise KeyboardInterrupt
        measure(run, found, *rest)

    monkeypatch.setattr(kernels, "measure_workload", interrupted)
    arguments = ["--quick", "--device", "cpu", "--op", "cross_attention", "--case", "tiny", "--mode", "dispatch"]
    assert kernels.main([*arguments, "--provider", "hia,eager", "--out", str(tmp_path)]) == 130
    found = read_records(tmp_path / "kernels.json")
    assert {(record.case, record.provider) for record in found} == {("tiny:extract", "hia"), ("tiny:extract", "eager")}
    assert all(record.mode == "dispatch" and record.roofline_ms is None for record in found)
    assert "interrupted" in capsys.readouterr().out


def test_every_provider_but_the_compiled_passes_on_tiny_shapes(tmp_path):
    """Ops both ways and composites; what can't run here says why."""
    path = tmp_path / "records.json"
    arguments = ["--quick", "--device", "cpu", "--case", "tiny-released,px-tiny:stage1-expand", "--json", str(path)]
    assert kernels.main([*arguments, "--mode", "forward,both"]) == 0
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
    assert kernels.main([*arguments, "--quick", "--json", str(path)]) == 0
    found = {(record.case, record.provider): record for record in read_records(path)}
    for case in ("px-tiny", "strided-tiny"):
        assert {found[case, name].status for name in ("hia", "eager", "plain", "plain_channels_last")} == {"ok"}
    assert found["px-tiny", "released"].status == "ok"
    assert found["strided-tiny", "released"].reason == "its encoder is ResNet-50"


def test_a_filtered_run_is_no_record_of_the_device(monkeypatch):
    options = kernels_args.parse(["--device", "cpu", "--op", "stem"])
    assert kernels_output.output_paths(options, "A CPU") == []
    (path,) = kernels_output.output_paths(kernels_args.parse(["--device", "cpu"]), "A CPU")
    assert path == environment.REPOSITORY / "bench" / "results" / "a-cpu" / "kernels.json"


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
    with pytest.raises(SystemExit):
        kernels.main(["--device", "cpu", *arguments] if "--device" not in arguments else arguments)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error.replace("\n", " ")), error


def test_cuda_without_a_device_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        kernels.main(["--device", "cuda"])
    assert "cuda needs a CUDA device" in capsys.readouterr().err


def test_list_on_a_fake_gpu(capsys, monkeypatch):
    """The plan for a CUDA device is made without one: nothing is drawn, nothing is run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert kernels.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert "cross_attention  13b-896-2img:extract  bf16  forward,backward,both" in printed
    assert "flash_attn_3" in printed and "stem  px-tiny  bf16  dispatch" in printed
    assert printed.strip().endswith("workloads on cuda")


def test_reasons_on_a_fake_gpu(monkeypatch):
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: sys.modules[__name__])
    found = {peer.name: peer for peer in peers.ATTENTIONS}
    wide = workload("cross_attention", "13b-released-896-2img", "extract")
    narrow = workload("cross_attention", "13b-896-2img", "extract")
    half = torch.bfloat16

    def reason(name, dtype, where):
        return found[name].unavailable_reason("cuda", dtype, where, "forward")

    assert reason("flash_attn_2", half, narrow) is None
    assert reason("flash_attn_2", half, wide) == "head_dim 640 is above its 256"
    assert reason("flash_attn_2", torch.float32, narrow) == "takes float16 or bfloat16 only"
    assert reason("sdpa_efficient", half, wide) is None and reason("xformers", half, wide) is None
    assert reason("ffpa", half, narrow) == "hands head_dim 128, below 320, to SDPA"
    assert reason("ffpa", half, wide) == "hands fewer than 512 queries or keys to SDPA"
    assert reason("ffpa_cutedsl", half, wide) is None


def test_missing_and_broken_packages_are_reasons(monkeypatch):
    assert peers.import_problem("no_such_package_here") == "no_such_package_here is not installed"

    def broken(name):
        raise OSError("libcudart.so.13: cannot open\nmore")

    monkeypatch.setattr(peers.importlib, "import_module", broken)
    assert peers.import_problem("flash_attn") == "flash_attn is broken: OSError: libcudart.so.13: cannot open"


def test_a_library_that_refuses_is_unavailable_and_says_why():
    found = kernels.refusal(RuntimeError("No available kernel. Aborting execution."), ["head_dim too large (Triggered"])
    assert found == {"status": "unavailable", "reason": "No available kernel. Aborting execution. head_dim too large"}
    assert kernels.refusal(ValueError("boom"), ["w"]) == {"status": "failed", "reason": "ValueError: boom"}


def test_ours_has_no_input_to_refuse(monkeypatch):
    monkeypatch.delenv("HIA_BACKEND", raising=False)
    raised = NotImplementedError("hia::stem: 40 channels are not supported")
    for name in ("hia", "textbook"):
        found = kernels.refusal(raised, [], name)
        assert found == {"status": "failed", "reason": f"NotImplementedError: {raised}"}
        assert kernels.refusal(RuntimeError("dtype not supported"), [], name)["status"] == "failed"
    assert kernels.refusal(raised, [], "hia-triton")["status"] == "unavailable"
    monkeypatch.setenv("HIA_BACKEND", "triton")
    assert kernels.refusal(raised, [], "hia")["status"] == "unavailable"


def test_furthest_takes_the_fastest_provider_of_each_workload():
    slow = replace(RECORD, provider="eager", p20_ms=9.0, p50_ms=9.0, p80_ms=9.0, percent_of_roofline=1.0)
    other = replace(RECORD, case="px448", percent_of_roofline=10.0)
    assert kernels_output.furthest([slow, RECORD, other]) == [other, RECORD]


def test_the_most_telling_shapes_come_first_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = kernels_args.parse([])
    everyone = list(providers.all_providers().values())
    tasks = kernels_args.tasks_of(options, everyone)
    assert tasks[0].workload.case.name in workloads.FIRST and tasks[0].workload.level == "composite"
    compiling = [all(provider.compiles for provider in task.providers) for task in tasks]
    assert compiling == sorted(compiling), "compiling comes last"
    compiled = tasks[compiling.index(True) :]
    assert {task.workload.case.name for task in compiled} == set(workloads.FIRST)
    for workload in {task.workload for task in tasks}:
        asked = [provider.name for task in tasks if task.workload == workload for provider in task.providers]
        assert sorted(asked) == sorted(provider.name for provider in everyone), "each once, measured or with a reason"
        assert kernels_args.too_slow_to_compile("cuda", workload) is (workload not in {t.workload for t in compiled})


def test_composites_and_896_pixels_come_early_on_the_cpu():
    for arguments in ([], ["--op", "inject_rows,adapter_layer", "--case", "13b-448,13b-896"]):
        found = [workload for workload, _ in kernels_args.parse(["--device", "cpu", *arguments]).plan]
        levels = [found.level for found in found if "896" in found.case.name] or [one.level for one in found]
        assert set(levels) == {"op", "composite"} and levels == sorted(levels)  # "composite" < "op"
    assert ["896" in one.case.name for one in found] == [True, True, False, False]


def test_no_new_task_after_the_time_is_over(tmp_path, capsys):
    arguments = ["--quick", "--device", "cpu", "--op", "stem,inject_rows", "--minutes", "1e-9"]
    assert kernels.main([*arguments, "--out", str(tmp_path)]) == 1, "nothing was measured"
    assert not (tmp_path / "kernels.json").exists(), "nothing replaces no record"
    assert "not measured, out of time: stem px-tiny fp32" in capsys.readouterr().out


def test_a_reference_that_raises_is_a_red_row(tmp_path, monkeypatch, capsys):
    def out_of_memory(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nmore")

    monkeypatch.setattr(kernels, "truth_of", out_of_memory)
    path = tmp_path / "records.json"
    arguments = ["--quick", "--device", "cpu", "--op", "stem", "--mode", "forward", "--json", str(path)]
    assert kernels.main(arguments) == 1
    (found,) = read_records(path)
    assert (found.provider, found.status) == ("reference", "failed")
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 80 GiB" in found.reason
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.compile
def test_compiled_providers_pass_the_gate(tmp_path):
    if providers.compiler_missing("cpu") is not None:
        pytest.skip(providers.compiler_missing("cpu"))
    path = tmp_path / "records.json"
    arguments = ["--device", "cpu", "--op", "condition_queries", "--case", "tiny", "--provider", "compile"]
    assert kernels.main([*arguments, "--mode", "forward,backward", "--json", str(path)]) == 0
    assert {record.mode for record in read_records(path)} == {"forward", "backward"}


@pytest.mark.parametrize(
    ("op", "role", "gathered"), [("condition_queries", "", "hidden"), ("norm_linear", "visual", "x")]
)
def test_gathering_reads_the_rows_that_are_named(op, role, gathered):
    found = workload(op, "tiny", role)
    given = workloads.make_inputs(found, torch.float32, "cpu")
    source, rows = given[gathered], given["row_idx"]
    assert rows.shape[0] < source.shape[0], "a case that reads every row proves nothing"
    others = sum(value.nbytes for name, value in given.items() if name != gathered and isinstance(value, torch.Tensor))
    out = found.entry.public(**given)
    expected = rows.shape[0] * source.shape[1] * source.element_size() + others + out.nbytes
    assert found.entry.inputs.moved_bytes(found.shape, 4, "forward") == expected
