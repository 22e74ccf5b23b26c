"""``bench smoke``: the list of kernels is whole, each has a case that launches it, and what is wrong shows."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")

from bench.gpu.stand_ins import rehearsing
from bench.gpu.steps import child_environment
from bench.launches.device import TARGETS
from bench.records.environment import REPOSITORY
from bench.smoke import cases as listed
from bench.smoke import run as smoke
from bench.smoke.cases import Case
from bench.smoke.run import Result
from bench.workloads import ops
from hia_kernels.core import triton_support

needs_compiler = pytest.mark.skipif(triton_support.interpreted(), reason="the interpreter's process")


def smoke_on_cpu(out, *arguments):
    command = [sys.executable, "-m", "bench", "smoke", "--device", "cpu", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=child_environment(), capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@needs_compiler
def test_every_kernel_is_launched_by_some_case():
    """A fake GPU runs the cases of a real one, where a kernel that no case reaches is a failure."""
    found = set()
    with rehearsing(TARGETS["sm_90"]), smoke.stored_configurations(used=False):
        for case in listed.cases("cuda", ops()):
            with listed.launched() as kernels:
                smoke.results_of(case, smoke.inputs_of(case, "cuda"))
            found |= kernels
    assert sorted(listed.kernels(ops()).keys() - found) == []
    assert len(found) >= 25


def test_verdicts():
    results = [
        Result("a", "ok", "", ("_first_kernel", "_second_kernel")),
        Result("b", "failed", "wrong", ("_second_kernel",)),
        Result("c", "refused", "not served", ("_third_kernel",)),
    ]
    verdicts = smoke.verdicts_of(results, ["_first_kernel", "_second_kernel", "_third_kernel"])
    assert list(verdicts.values()) == ["ok", "failed", "not launched"]


@pytest.fixture
def case():
    return Case("row_softmax", "small", "fp32", "triton")


def problems(case, monkeypatch, change):
    """Run a case whose op is its reference, with its results changed."""
    entry = smoke.op_entry(case.op)

    def results_of(case, inputs):
        return change(smoke.testing.forward_backward(entry.reference, inputs, entry.inputs.DIFFERENTIABLE))

    monkeypatch.setattr(smoke, "results_of", results_of)
    return smoke.problems_of(case, "cpu")


def test_what_is_right_has_no_problem(case, monkeypatch):
    assert problems(case, monkeypatch, lambda results: results) == []


def test_a_wrong_element_shows(case, monkeypatch):
    def change(results):
        results["out"].view(-1)[3] *= 1.5
        return results

    (problem,) = problems(case, monkeypatch, change)
    assert problem.startswith("out")


def test_other_bits_show(case, monkeypatch):
    runs = iter((0.0, 1e-9))

    def change(results):
        return {**results, "out": results["out"] + next(runs)}

    assert "out: another run has other bits" in problems(case, monkeypatch, change)


def test_bits_are_compared_as_bits():
    nan, zero = torch.tensor([float("nan")]), torch.zeros(1, dtype=torch.float32)
    assert smoke.same_bits(nan, nan.clone())
    assert not smoke.same_bits(zero, -zero)


@pytest.mark.slow
def test_in_the_interpreter(tmp_path):
    code, printed = smoke_on_cpu(tmp_path, "--op", "row_softmax", "inject_rows")
    assert code == 0, printed
    assert "ok           _row_softmax_fwd_kernel" in printed
    results = json.loads((tmp_path / "smoke.json").read_text())["results"]
    assert [one["status"] for one in results] == ["ok"] * 3
