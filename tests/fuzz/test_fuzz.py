"""A small campaign in every run of the tests, and proof that a campaign sees what it is for."""

from __future__ import annotations

import dataclasses
import os
import random
import sys

import pytest

pytest.importorskip("hypothesis", reason="NO HYPOTHESIS: nothing is fuzzed")

import hia_kernels
from hia_kernels.core import backend, triton_support
from tests.fuzz import campaign, jobs, subjects
from tests.fuzz.__main__ import chosen, parse
from tests.fuzz.case import Case
from tests.fuzz.check import Fault, check
from tests.fuzz.invalid import mutations
from tests.fuzz.jobs import INVALID, VALID, Job, Outcome
from tests.fuzz.strategies import CALLS
from tests.inputs import OPS

VALID_CASES, INVALID_CASES, INTERPRETED_CASES = 430, 70, 24
# The same cases in every run, as of all property tests; HYPOTHESIS_PROFILE=random draws others. A failure says which.
SEED = random.randrange(2**31) if os.environ.get("HYPOTHESIS_PROFILE") == "random" else 0
PLAIN = [call for call in CALLS if not triton_support.interpreted()]

SHAPES = {
    "condition_queries": {"tokens": 9, "samples": 3},
    "conv_norm_act": {"size": (5, 4), "residual": True, "channels": (32, 32)},
    "cross_attention": {"lengths_q": (3, 4), "lengths_k": (5, 4)},
    "head_linear": {"images": 2, "rows": 9},
    "inject_rows": {"tokens": 9, "rows": 5},
    "latent_attention": {"rows": 6, "width": 16, "lengths": (5, 4)},
    "linear": {"rows": 9},
    "norm_linear": {"tokens": 9, "rows": 5},
    "row_softmax": {"rows": 5, "columns": 9},
    "stem": {"size": (16, 17), "out_channels": 32},
}


def assert_no_fault(job: Job) -> Outcome:
    outcome = jobs.run(job)
    assert not outcome.fault, f"{job}: {outcome.fault}\n\n{outcome.program}"
    return outcome


def run_share(op: str, kind: str, cases: int) -> Outcome:
    """Run a share of the cases, as many for one op as for another, and add up what became of them."""
    calls = [call for call in PLAIN if subjects.SUBJECTS[call[0]].op == op]
    outcomes = []
    for position, (function, name) in enumerate(calls):
        mine = cases // len(calls) + (position < cases % len(calls))
        if mine:
            outcomes.append(assert_no_fault(Job(function, name, kind, mine, SEED + position)))
    return Outcome(sum(outcome.checked for outcome in outcomes), sum(outcome.refused for outcome in outcomes))


@pytest.mark.skipif(not PLAIN, reason="the interpreter has its own cases")
@pytest.mark.parametrize("op", OPS)
def test_valid_calls(op):
    outcome = run_share(op, VALID, VALID_CASES // len(OPS))
    assert outcome.checked > outcome.refused, f"{outcome}: most calls were refused by their backend"


@pytest.mark.skipif(not PLAIN, reason="the interpreter has its own cases")
@pytest.mark.parametrize("op", OPS)
def test_wrong_calls(op):
    outcome = run_share(op, INVALID, INVALID_CASES // len(OPS))
    assert outcome.checked == INVALID_CASES // len(OPS), f"{outcome}: a wrong call was not drawn, or not made"
    assert not outcome.refused


@pytest.mark.skipif(not PLAIN, reason="the interpreter has its own cases")
@pytest.mark.parametrize("function", sorted({function for function, _ in PLAIN}))
def test_every_wrong_call_of_one_shape(function):
    subject = subjects.SUBJECTS[function]
    options = {"pad_rows": True} if subject.packed else {}
    options |= {"softmax_scale": None} if subject.op == "cross_attention" else {}
    right = Case(function, "auto", shape=SHAPES[subject.op], options=options)
    found = mutations(right)
    assert len(found) > 5 and {name for name, _ in found} >= set(subject.shapes)
    for mutation in found:
        for raw in (False, True):
            if raw and (subject.packed or mutation[1].startswith("python-")):
                continue  # a Python type is checked by the dispatcher, and packed weights have no such op
            check(dataclasses.replace(right, mutation=mutation, raw=raw))


@pytest.mark.interpreter
@pytest.mark.skipif(not triton_support.interpreted(), reason="TRITON KERNELS: they are fuzzed in the interpreter")
def test_triton_kernels():
    found = [call for call in CALLS if call[1] == "triton"]
    assert len({subjects.SUBJECTS[function].op for function, _ in found}) == 8
    for position, (function, name) in enumerate(found):
        assert_no_fault(Job(function, name, VALID, INTERPRETED_CASES // len(found), SEED + position))


def replaced(monkeypatch, op, row_name, function, wrong):
    """Put ``wrong``, which is given the right function, in a row's place."""
    table = backend.TABLES[op]
    rows = [
        dataclasses.replace(row, functions={**row.functions, function: wrong(row.functions[function])})
        if row.name == row_name
        else row
        for row in table.backends
    ]
    monkeypatch.setattr(table, "backends", rows)


def assert_caught(job, message):
    """Check that the fault is found, and that what is printed shows it again."""
    outcome = jobs.run(job)
    assert message in outcome.fault
    with pytest.raises(Fault, match=message):
        exec(outcome.program, {})
    return outcome


def test_one_wrong_element_is_caught(monkeypatch):
    def wrong(right):
        def linear(x, weight, bias):
            out = right(x, weight, bias)
            if out.numel() > 20:  # so that there is something to shrink
                out[-1, -1] += 0.01 + out[-1, -1].abs() / 100
            return out

        return linear

    replaced(monkeypatch, "linear", "reference", "linear", wrong)
    outcome = assert_caught(Job("linear", "reference", VALID, 60, 0), "out: ")
    assert "values=" not in outcome.program and "layouts=" not in outcome.program  # shrunk


def test_a_wrong_gradient_is_caught(monkeypatch):
    def wrong(right):
        return lambda dp, p, scale, dlse=None: right(dp, p, scale, dlse) * (1 + 1e-3)

    replaced(monkeypatch, "row_softmax", "reference", "row_softmax_bwd", wrong)
    assert_caught(Job("row_softmax", "reference", VALID, 60, 0), "dscores: ")


def test_a_written_input_is_caught(monkeypatch):
    def wrong(right):
        def linear(x, weight, bias):
            out = right(x, weight, bias)
            if weight.numel():
                weight.view(-1)[0] = 1.0 if weight.is_contiguous() else weight[0, 0]
            return out

        return linear

    replaced(monkeypatch, "linear", "reference", "linear", wrong)
    assert_caught(Job("linear", "reference", VALID, 60, 0), "it changed")


def test_a_wrong_call_that_returns_is_caught(monkeypatch):
    lax = dataclasses.replace(subjects.SUBJECTS["linear"], call=lambda x, weight, bias: x)
    monkeypatch.setitem(subjects.SUBJECTS, "linear", lax)
    assert_caught(Job("linear", "auto", INVALID, 60, 0), "it returned")


def test_a_process_that_dies_is_a_fault(tmp_path):
    code = (
        "import os, sys; print('[]', flush=True); sys.stdin.readline(); "
        "open(sys.argv[1], 'w').write('check(1)'); os.abort()"
    )
    worker = campaign.Worker(campaign.PLAIN, tmp_path, [sys.executable, "-c", code])
    outcome = worker.run(Job("linear", "auto", VALID, 1, 0))
    assert "SIGABRT" in outcome.fault and outcome.program == "check(1)" and not worker.is_alive


def test_every_call_has_its_share():
    calls = {campaign.PLAIN: [("linear", "auto"), ("linear", "cpu"), ("stem", "auto")], campaign.INTERPRETED: []}
    shared = campaign.plan(calls, 1000, 7)
    assert sum(job.cases for _, job in shared) == 1000
    by_call = {(job.function, job.backend, job.kind): 0 for _, job in shared}
    for _, job in shared:
        by_call[job.function, job.backend, job.kind] += job.cases
    assert by_call["stem", "auto", VALID] == 425 and by_call["linear", "cpu", INVALID] in (37, 38)
    assert len({job.seed for _, job in shared}) == len(shared)
    chosen_alone = chosen(calls, parse(["--op", "stem"]))
    assert chosen_alone[campaign.PLAIN] == [("stem", "auto")]
    with pytest.raises(SystemExit, match="must be among"):
        chosen(calls, parse(["--op", "stm"]))


def test_the_table_adds_up():
    done = [
        (Job("linear", "cpu", VALID, 9, 0), Outcome(checked=7, refused=2, seconds=0.9)),
        (Job("linear", "cpu", INVALID, 9, 0), Outcome(checked=4, fault="it returned")),
    ]
    lines = campaign.table(done).splitlines()
    assert lines[1].split() == ["linear", "cpu", "7", "4", "2", "69", "1"]
    assert lines[-1].split() == ["all", "7", "4", "2", "69", "1"]


def test_every_public_function_is_fuzzed():
    public = set(hia_kernels.__all__) - {"__version__", "use_backend", "last_backend"}
    assert public <= set(subjects.SUBJECTS)
