"""Times configurations of the Triton kernels on this GPU and keeps the best ones: ``python -m bench tune``.

Writes ``hia_kernels/core/tuned/<device>.json``, which launchers read through ``hia_kernels.core.tuning.pick``. What
is tried for a key: the configurations in a launcher module's ``CANDIDATES`` (a list, or a dict of lists by how the
key begins), else other numbers of warps and stages around the heuristic; at most eight, the heuristic among them. A
configuration whose results miss the tests' tolerance is not timed.

Afterwards the backends of :data:`RIVALS` are timed against each other, at the shapes of ResNet-50; the file keeps the
fastest's name, and the op's table takes it from there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import hia_kernels
from hia_kernels import ops as all_ops
from hia_kernels.core import backend, tuning
from hia_kernels.ops.conv_norm_act import cudnn
from hia_kernels.ops.conv_norm_act import inputs as convolution
from hia_kernels.ops.conv_norm_act.reference import conv_norm_act_ref
from hia_kernels.testing import analysed

from ..measure.accuracy import Truth, results_of, truth_of
from ..measure.roofline import DTYPES
from ..measure.timing import Budget, Clock, CudaClock, exact_matmuls, interleaved
from ..providers.bound import both_call, dout_like
from ..providers.registry import Ours
from ..records import environment
from ..records.files import write_text
from ..workloads import RESOLUTIONS, Workload, gpu_workloads, make_inputs, ops
from ..workloads.conv_norm_act import resnet50_shapes
from .options import names

Config = dict[str, int]
AT_MOST = 8  # configurations a key
GAIN = 0.03  # what a configuration must save to be kept
BUDGET = Budget(1.0, at_least=8, at_most=40)
WARPS, STAGES = (1, 2, 4, 8, 16), (1, 2, 3, 4, 5)
OF_KERNELS = ("triton", "cublas")  # backends whose Triton kernels ask for configurations
RIVALS = {"conv_norm_act": ("triton", "cudnn")}  # the first serves where nothing was measured


@dataclass
class Tuned:
    """What was found.

    Attributes:
        configurations: "<op>/<key>" -> configuration, where one is better than the heuristic.
        gains: by the same names, the heuristic's time over the configuration's.
        seen: every key met, with its heuristic.
        backends: "<op>/<key>" -> the fastest backend at that shape; its gain is over the first of :data:`RIVALS`.
    """

    configurations: dict[str, Config] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    seen: dict[str, Config] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)


@contextmanager
def using(configurations: dict[str, Config]) -> Iterator[None]:
    """Launchers take these instead of the device's file."""
    before = tuning.stored
    tuning.stored = lambda _slug: configurations  # type: ignore[assignment]
    try:
        yield
    finally:
        tuning.stored = before


@contextmanager
def recording() -> Iterator[dict[str, Config]]:
    """Collects the keys that launchers ask for, with their heuristics."""
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
    """The heuristic, and what else is worth a try for "<op>/<key>"."""
    op, _, key = name.partition("/")
    found = [dict(heuristic)]
    for config in _listed(op, key) or _neighbours(heuristic):
        whole = {**heuristic, **config}
        if set(config) <= set(heuristic) and whole not in found:
            found.append(whole)
    return found[:AT_MOST]


def _listed(op: str, key: str) -> list[Config]:
    """Of the op's launcher modules."""
    found: list[Config] = []
    package = importlib.import_module(f"{all_ops.__name__}.{op}")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("triton_"):
            listed = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "CANDIDATES", [])
            groups = listed.items() if isinstance(listed, dict) else [("", listed)]
            found += [dict(config) for start, group in groups if key.startswith(start) for config in group]
    return found


def _neighbours(heuristic: Config) -> list[Config]:
    """One step in warps, stages or both: changes no result."""
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
        tuned.configurations[name] = {
            part: value for part, value in fitting[best].items() if tuned.seen[name].get(part) != value
        }
        tuned.gains[name] = round(medians[usual] / medians[best], 3)


def tune_workload(workload: Workload, dtype: str, tuned: Tuned, clock: Clock, device: str = "cuda") -> list[str]:
    """All keys of a workload that were not met before, forward and backward.

    Returns:
        Their names.
    """
    inputs, new = make_inputs(workload, DTYPES[dtype], device), []
    rows = [row.name for row in backend.TABLES[workload.op].backends if row.name in OF_KERNELS]
    for gradients in (False, True):
        truth = truth_of(workload, inputs, None, DTYPES[dtype], gradients=gradients)
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
                    tune_key(name, tuned, call, problem, clock, BUDGET)
    return new


def race(
    shape: convolution.Shape,
    dtype: torch.dtype,
    tuned: Tuned,
    clock: Clock,
    device: str = "cuda",
    budget: Budget = BUDGET,
) -> str | None:
    """Time the rival backends of ``conv_norm_act`` at a shape; the first keeps what another does not clearly win.

    Returns:
        Its name in the file; None if that was measured before, or if only one of them has right results here.
    """
    inputs = convolution.make_inputs(shape, dtype, device)
    inputs["weight"] = inputs["weight"].contiguous(memory_format=torch.channels_last)
    name = f"conv_norm_act/{cudnn.backend_key(inputs['x'], inputs['weight'], shape.stride)}"
    if name in tuned.backends:
        return None
    truth = Truth({"out0": conv_norm_act_ref(**analysed(inputs, dtype))}, {"out0": conv_norm_act_ref(**inputs)}, dtype)

    def with_backend(rival: str) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with hia_kernels.use_backend(rival), using(tuned.configurations):
                return hia_kernels.conv_norm_act(**inputs)

        return run

    calls = {}
    for rival in RIVALS["conv_norm_act"]:
        try:
            wrong = truth.check({"out0": with_backend(rival)()})[0]
        except (NotImplementedError, RuntimeError) as raised:
            wrong = str(raised)
        if wrong is None:
            calls[rival] = with_backend(rival)
    if len(calls) < 2:
        return None
    times = interleaved(calls, clock, budget, shortest_ms=0.0)
    medians = {rival: samples.percentile(50) for rival, samples in times.items() if samples.times_ms}
    usual = RIVALS["conv_norm_act"][0]
    if usual not in medians:
        return None
    best = min(medians, key=lambda rival: medians[rival])
    tuned.backends[name] = best if medians[usual] > (1 + GAIN) * medians[best] else usual
    tuned.gains[name] = round(medians[usual] / medians[tuned.backends[name]], 3)
    return name


def write(path: Path, tuned: Tuned, facts: dict[str, Any]) -> None:
    """The device's file: what was found now beside what it held of other keys."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = {name: config for name, config in before.get("configurations", {}).items() if name not in tuned.seen}
    backends = {**before.get("backends", {}), **tuned.backends}
    gains = {name: gain for name, gain in before.get("gains", {}).items() if name in kept or name in backends}
    content = {
        "configurations": dict(sorted({**kept, **tuned.configurations}.items())),
        "backends": dict(sorted(backends.items())),
        "gains": dict(sorted({**gains, **tuned.gains}.items())),
        "environment": facts,
    }
    write_text(path, json.dumps(content, indent=1) + "\n")
    tuning.stored.cache_clear()
    tuning.stored_backends.cache_clear()


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, write.

    Returns:
        0; 2 without a CUDA device.
    """
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    parser.add_argument("--op", action="append", metavar="NAME", help=f"{', '.join(ops())} (default: all)")
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES), help="of the inputs (default: bf16)")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no new workload after that long")
    parser.add_argument("--out", type=Path, metavar="FILE", help="instead of hia_kernels/core/tuned/<device>.json")
    options = parser.parse_args(arguments)
    try:
        chosen = names("--op", options.op or ["*"], ops())
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        sys.stderr.write("bench.ops.tune needs a CUDA device that torch can see, got none\n")
        return 2
    os.environ["HIA_TUNED"] = "1"
    facts = environment.describe("cuda", "bench.ops.tune")
    path = options.out or tuning.FOLDER / f"{tuning.device_slug(torch.cuda.get_device_name())}.json"
    tuned, clock, started = Tuned(), CudaClock(), time.perf_counter()
    with exact_matmuls():
        for workload in (one for one in gpu_workloads() if one.op in chosen):
            if options.minutes and time.perf_counter() - started > 60 * options.minutes:
                print(f"not begun, the time is over: {workload.op} {workload.name}", flush=True)
                continue
            for name in tune_workload(workload, options.dtype, tuned, clock):
                gain = tuned.gains.get(name)
                print(
                    f"{name}: " + (f"{tuned.configurations[name]}, {gain} times as fast" if gain else "as it is"),
                    flush=True,
                )
            write(path, tuned, facts)
            torch.cuda.empty_cache()
        for shape in (one for side in RESOLUTIONS for one in resnet50_shapes(side) if "conv_norm_act" in chosen):
            if options.minutes and time.perf_counter() - started > 60 * options.minutes:
                print(f"not begun, the time is over: backends at {shape}", flush=True)
                continue
            won = race(shape, DTYPES[options.dtype], tuned, clock)
            if won is not None:
                print(f"{won}: {tuned.backends[won]}, {tuned.gains[won]} times as fast", flush=True)
                write(path, tuned, facts)
            torch.cuda.empty_cache()
    print(f"{len(tuned.configurations)} of {len(tuned.seen)} keys have a better configuration; written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
