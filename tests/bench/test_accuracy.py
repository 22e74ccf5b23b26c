"""The check before any timing, and what it lets through."""

from __future__ import annotations

import re

import torch

from bench import workloads
from bench.measure import accuracy
from bench.providers import registry as providers
from hia_kernels.testing import UNIT_ROUNDOFF


def workload(op, case, role=""):
    return workloads.Workload(op, workloads.CASES[case], role)


def test_the_check_lets_nothing_wrong_through():
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
