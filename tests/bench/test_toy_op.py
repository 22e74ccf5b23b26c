"""A new op brings its own folder and one entry; benchmarks, the regression set and the compile tier then have it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor

from bench import workloads
from bench.__main__ import main as bench
from bench.compare import regression
from bench.compare import worker as regression_worker
from bench.launches import limits
from bench.launches import workloads as launches
from bench.launches.compile import compile_all
from bench.launches.device import TARGETS
from bench.ops.plan import Request, make_plan
from bench.records.record import read_records
from hia_kernels.core import backend, triton_support

OP = "row_dot"
NO_COMPILER = (
    "NO TRITON: its launches are not compiled"
    if not triton_support._has_triton()
    else ("the interpreter tier runs in this process" if triton_support.interpreted() else "")
)


def test_it_is_unknown_elsewhere():
    assert OP not in workloads.ops() and OP not in regression.cases() and OP not in backend.TABLES


def measured(path) -> tuple[int, dict]:
    code = bench(["ops", "--quick", "--device", "cpu", "--op", OP, "--json", str(path)])
    return code, {(record.provider, record.mode): record for record in read_records(path)}


def test_it_gets_a_benchmark(toy, tmp_path):
    code, found = measured(tmp_path / "records.json")
    assert code == 0
    shape = toy.cases[1].shape
    for provider in ("hia", "eager"):
        for mode in ("forward", "backward", "both", "dispatch"):
            record = found[provider, mode]
            own = "forward" if mode == "dispatch" else mode
            assert (record.status, record.case, record.level) == ("ok", "small", "op")
            assert record.flops == toy.inputs.flops(shape, own)
            assert record.bytes == toy.inputs.moved_bytes(shape, 4, own)
    assert found["hia", "forward"].extra["backend"] == "reference"
    assert found["hia-triton", "forward"].status == "unavailable"


def test_wrong_results_are_not_timed(toy, tmp_path):
    workloads.unregister(OP)
    workloads.register(replace(toy, function=lambda x, y: toy.public(x, y) * 1.01))
    code, found = measured(tmp_path / "records.json")
    assert code == 1 and found["eager", "forward"].status == "ok"
    assert found["hia", "forward"].reason.startswith("beyond the tolerance: out0")


def test_it_gets_a_regression_case(toy, tmp_path):
    assert {OP, f"{OP}:both"} <= set(regression.cases())
    x = regression.given(OP)["inputs"]["x"]
    assert x.shape == (64, 768)
    assert regression.make_call(OP)().shape == (64,)
    dx, dy = regression.make_call(f"{OP}:both")()
    assert dx.shape == dy.shape == x.shape
    assert regression_worker.time_call(regression.make_call(OP), 1) > 0
    regression.write_inputs(tmp_path / "inputs.pt", [OP, "encode"])
    handed = torch.load(tmp_path / "inputs.pt", weights_only=True)
    assert list(handed) == [OP] and torch.equal(handed[OP]["inputs"]["x"], x)


@pytest.mark.compile
@pytest.mark.skipif(bool(NO_COMPILER), reason=str(NO_COMPILER))
def test_its_launches_are_recorded_and_compiled(toy, tmp_path):
    recording = launches.record(TARGETS["sm_90"], [OP])
    assert {launch.kernel for launch in recording.launches} == {"_row_dot_fwd_kernel"}
    assert [list(uses.workloads) for uses in recording.launches.values()] == [
        [f"{OP} large {dtype} triton"] for dtype in ("bf16", "fp16", "fp32")
    ]
    results = compile_all([(launch, "sm_90") for launch in recording.launches], jobs=1, folder=tmp_path)
    assert all(result.registers > 0 for result in results.values()) and limits.broken(recording, results, OP) == []


def test_it_gets_a_compile_case_and_is_tuned(toy, monkeypatch):
    (large,) = [workload for workload in workloads.gpu_workloads() if workload.op == OP]
    with FakeTensorMode():
        inputs = workloads.make_inputs(large, torch.bfloat16, "cpu")
    assert all(isinstance(x, FakeTensor) and x.shape == (4096, 5120) for x in inputs.values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(["tune", "--op", OP]) == 2, "tuning knows the op; it lacks a device alone"
    assert [workload.name for workload, _ in make_plan(Request(device="cpu", op=[OP])).steps] == ["small"]
