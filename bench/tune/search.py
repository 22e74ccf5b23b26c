"""Tile sizes: the configurations of a kernel timed against each other, the best kept if it is clearly better.

What is tried for a key: the configurations in a launcher module's ``CANDIDATES`` (a list, or a dict of lists by how the
key begins), else other numbers of warps and stages around the heuristic; at most eight, the heuristic among them. A
configuration whose results miss the tests' tolerance is not timed.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hia_kernels import ops as all_ops
from hia_kernels.core import backend, tuning

from ..measure.accuracy import results_of, truth_of
from ..measure.timing import Budget, Clock, interleaved
from ..providers.bound import both_call, dout_like
from ..providers.registry import Ours
from ..records.devices import torch_dtype
from ..workloads import Workload, make_inputs

Config = dict[str, int]
AT_MOST = 8  # configurations a key
GAIN = 0.03  # what a configuration must save to be kept
BUDGET = Budget(1.0, at_least=8, at_most=40)
WARPS, STAGES = (1, 2, 4, 8, 16), (1, 2, 3, 4, 5)
OF_KERNELS = ("triton", "cublas")  # backends whose Triton kernels ask for configurations


@dataclass
class Tuned:
    """Findings of a device.

    Attributes:
        configurations: "<op>/<key>" -> configuration, where one is better than the heuristic.
        gains: by the same names, the heuristic's time over the configuration's.
        seen: every key met, with its heuristic.
        backends: "<op>/<key>" -> the fastest backend at that shape; its gain is over the one that serves where
            nothing was measured.
    """

    configurations: dict[str, Config] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    seen: dict[str, Config] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)


@contextmanager
def using(configurations: dict[str, Config]) -> Iterator[None]:
    """Have launchers take these instead of the device's file."""
    before = tuning.stored
    tuning.stored = lambda _slug: configurations  # type: ignore[assignment]
    try:
        yield
    finally:
        tuning.stored = before


@contextmanager
def recording() -> Iterator[dict[str, Config]]:
    """Collect the keys that launchers ask for, with their heuristics."""
    before, found = tuning.pick, {}

    def pick(op: str, key: str, device: torch.device, heuristic: tuning.Config) -> Config:
        found[f"{op}/{key}"] = dict(heuristic)
        return before(op, key, device, heuristic)

    tuning.pick = pick
    try:
        yield found
    finally:
        tuning.pick = before


def candidates(name: str, heuristic: Config) -> list[Config]:
    """Return the heuristic, and what else is worth a try for "<op>/<key>"."""
    op, _, key = name.partition("/")
    found = [dict(heuristic)]
    for config in _listed(op, key) or _neighbours(heuristic):
        whole = {**heuristic, **config}
        if set(config) <= set(heuristic) and whole not in found:
            found.append(whole)
    return found[:AT_MOST]


def _listed(op: str, key: str) -> list[Config]:
    """List the candidates of the op's launcher modules."""
    found: list[Config] = []
    package = importlib.import_module(f"{all_ops.__name__}.{op}")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("triton_"):
            listed = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "CANDIDATES", [])
            groups = listed.items() if isinstance(listed, dict) else [("", listed)]
            found += [dict(config) for start, group in groups if key.startswith(start) for config in group]
    return found


def _neighbours(heuristic: Config) -> list[Config]:
    """Go one step in warps, stages or both: that changes no result."""
    steps: dict[str, list[int]] = {}
    for name, ladder in (("num_warps", WARPS), ("num_stages", STAGES)):
        if heuristic.get(name) in ladder:
            at = ladder.index(heuristic[name])
            steps[name] = [ladder[place] for place in (at, at - 1, at + 1) if 0 <= place < len(ladder)]
    warps, stages = steps.get("num_warps", [None]), steps.get("num_stages", [None])
    pairs = [(w, s) for s in stages for w in warps]
    known = [{"num_warps": w, "num_stages": s} for w, s in pairs]
    return [{name: value for name, value in config.items() if value is not None} for config in known]


def tune_key(
    name: str, tuned: Tuned, call: Callable[[], Any], problem: Callable[[], str | None], clock: Clock, budget: Budget
) -> None:
    """Try the configurations of a key in turns, and keep the best if it is better than the heuristic.

    Args:
        name: "<op>/<key>", one of ``tuned.seen``.
        tuned: what is known; changed.
        call: runs the op, whatever else it launches.
        problem: runs it and says what is wrong with its results.
        clock: times a call.
        budget: of repetitions.
    """

    def with_config(config: Config) -> Callable[[], Any]:
        def run() -> None:
            with using({**tuned.configurations, name: config}):
                call()

        return run

    fitting: dict[str, Config] = {}
    for config in candidates(name, tuned.seen[name]):
        with using({**tuned.configurations, name: config}):
            try:
                wrong = problem()
            except Exception as raised:  # too much shared memory, say
                wrong = str(raised)
        if wrong is None:
            fitting[json.dumps(config)] = config
    times = interleaved({text: with_config(config) for text, config in fitting.items()}, clock, budget, shortest_ms=0.0)
    medians = {text: samples.percentile(50) for text, samples in times.items() if samples.times_ms}
    usual = json.dumps(tuned.seen[name])
    if usual not in medians:
        return
    best = min(medians, key=lambda text: medians[text])
    if medians[usual] > (1 + GAIN) * medians[best]:
        tuned.configurations[name] = fitting[best]  # whole: a key's heuristic may be another one elsewhere
        tuned.gains[name] = round(medians[usual] / medians[best], 3)


def tune_workload(
    workload: Workload,
    dtype: str,
    tuned: Tuned,
    clock: Clock,
    device: str = "cuda",
    begin: Callable[[str], None] = lambda _name: None,
) -> list[str]:
    """Tune all keys of a workload that were not met before, forward and backward; ``begin`` is told each of them.

    Returns:
        Their names.
    """
    inputs, new = make_inputs(workload, torch_dtype(dtype), device), []
    rows = [row.name for row in backend.TABLES[workload.op].backends if row.name in OF_KERNELS]
    for gradients in (False, True):
        truth = truth_of(workload, inputs, None, torch_dtype(dtype), gradients=gradients)
        for row in rows:
            bound = Ours(row).bind(workload, inputs, None, gradients=gradients)

            def problem(bound: Any = bound, truth: Any = truth, gradients: bool = gradients) -> str | None:
                return truth.check(results_of(bound, truth.exact, gradients=gradients))[0]

            with recording() as found, using(tuned.configurations):
                outs = bound.forward()
                call = both_call(bound, dout_like(outs)) if gradients else torch.no_grad()(bound.forward)
                call()
            for name, heuristic in found.items():
                if name not in tuned.seen:
                    tuned.seen[name] = heuristic
                    new.append(name)
                    begin(name)
                    tune_key(name, tuned, call, problem, clock, BUDGET)
    return new
