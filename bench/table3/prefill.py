"""Real prefills in a process of their own: the small host on the CPU, the 13B host on CUDA.

``python -m bench.table3.prefill REQUEST`` reads a request as JSON and writes one JSON line per case as it finishes.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..measure.memory import Meter, process_peak_unavailable, user_meter
from ..records.devices import torch_dtype
from ..records.environment import REPOSITORY
from ..workloads import images
from . import hosts, methods
from .hosts import HostSpec

# a run that needs more than this share of the device is not started uncapped
USABLE = 0.92


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        resolution: pixels.
        attention: eager or sdpa.
        predicted_bytes: the prediction, by which it is decided what can be started.
    """

    resolution: int
    attention: str
    predicted_bytes: int


@dataclass(frozen=True)
class RunRequest:
    """A method's runs, JSON-ready.

    Attributes:
        method: see ``methods.METHODS``.
        host: fields of a :class:`HostSpec`.
        dtype: "bf16", "fp16" or "fp32".
        device: "cpu" or "cuda".
        cases: in the order to run them.
        images: per sample.
        text_tokens: beside the images'.
        image_folder: None takes the default.
        card_bytes: on CUDA, the cap under which rows predicted not to fit are provoked; None provokes nothing.
        repeats: timed runs a case, at most.
        budget_s: seconds of timed runs a case.
    """

    method: str
    host: dict[str, Any]
    dtype: str
    device: str
    cases: tuple[Case, ...]
    images: int
    text_tokens: int
    image_folder: str | None = None
    card_bytes: int | None = None
    repeats: int = 3
    budget_s: float = 2.0

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunRequest:
        """The inverse."""
        fields = json.loads(text)
        fields["cases"] = tuple(Case(**case) for case in fields["cases"])
        return cls(**fields)


@dataclass(frozen=True)
class Measured:
    """One prefill.

    Attributes:
        memory_bytes: peak; None where it can't be measured, or the run ran out of memory.
        memory_kind: how it was measured, or why not.
        prefill_ms: median of ``times_ms``; None if out of memory.
        times_ms: every timed run.
        out_of_memory: torch.OutOfMemoryError was raised.
    """

    memory_bytes: int | None
    memory_kind: str
    prefill_ms: float | None
    times_ms: tuple[float, ...] = ()
    out_of_memory: bool = False


def measure_prefill(
    model: nn.Module, inputs: dict[str, Any], meter: Meter | None, *, repeats: int = 3, budget_s: float = 3.0
) -> Measured:
    """Measure the peak and the time of a prefill.

    The first run gives the peak. Runs that follow give the time; if the first took longer than ``budget_s``, none
    follow and it gives both, except on CUDA, where it may have compiled kernels.

    Args:
        model: in eval mode, on the inputs' device.
        inputs: its keyword arguments.
        meter: None measures time only.
        repeats: timed runs, at most.
        budget_s: seconds for all timed runs.
    """
    run = _timer(model, inputs)
    try:
        first, peak = _first(run, meter)
        times = [first] if first > budget_s * 1e3 and not inputs["input_ids"].is_cuda else []
        while not times or (len(times) < repeats and sum(times) + times[-1] <= budget_s * 1e3):
            times.append(run())
    except torch.OutOfMemoryError:
        return Measured(None, "out of memory, provoked", None, (), True)
    kind = meter.kind if meter is not None else f"not measured: {process_peak_unavailable()}"
    return Measured(peak, kind, statistics.median(times), tuple(times))


def _first(run: Callable[[], float], meter: Meter | None) -> tuple[float, int | None]:
    if meter is None:
        return run(), None
    gc.collect()
    found = meter.measure(run)
    return found.result, found.peak


def _timer(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], float]:
    """Make a function that runs one prefill and returns its milliseconds."""

    @torch.no_grad()
    def on_cpu() -> float:
        start = time.perf_counter()
        model(**inputs)
        return (time.perf_counter() - start) * 1e3

    @torch.no_grad()
    def on_cuda() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        model(**inputs)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return on_cuda if inputs["input_ids"].is_cuda else on_cpu


@dataclass(frozen=True)
class RunResult:
    """One case's measurement.

    Attributes:
        resolution: pixels.
        attention: eager or sdpa.
        measured: without a cap; None if the device is too small for the predicted peak.
        capped: under the card's cap, for cases predicted not to fit it; None for the others.
    """

    resolution: int
    attention: str
    measured: Measured | None
    capped: Measured | None


def run_requests(request: RunRequest) -> Iterator[RunResult]:
    """Run a request's cases in this process."""
    spec, dtype = HostSpec(**request.host), torch_dtype(request.dtype)
    source = images.find_images(request.image_folder)
    text = images.prompt_text(request.text_tokens, spec.image_token).ids
    if request.device == "cpu":
        _warm_up(request.method, dtype)
    meter = user_meter(request.device)
    with torch.device(request.device):
        model = methods.build_model(request.method, spec, dtype, request.cases[0].attention)
    model.requires_grad_(False)
    for case in request.cases:
        methods.host_of(request.method, model).set_attn_implementation(case.attention)
        sample = methods.Sample(source.load(request.images, case.resolution), text)
        inputs = methods.make_inputs(request.method, model, spec, sample, request.device)
        del sample
        yield RunResult(
            case.resolution,
            case.attention,
            _uncapped(model, inputs, meter, case, request),
            _capped(model, inputs, meter, case, request),
        )
        del inputs


def _warm_up(method: str, dtype: torch.dtype) -> None:
    """Run a tiny model once: the code that loads on first use must not count as the measured model's memory."""
    text = {**hosts.SMALL_LLM, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 128}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    vision = {**hosts.SMALL_VIT, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    tiny = HostSpec("tiny", text, vision | {"num_attention_heads": 4})
    for attention in ("eager", "sdpa"):
        model = methods.build_model(method, tiny, dtype, attention)
        sample = methods.Sample([images.phantom(448, 0)], [1] * 8)
        measure_prefill(model, methods.make_inputs(method, model, tiny, sample), None, repeats=1, budget_s=0)


def _uncapped(
    model: nn.Module, inputs: dict[str, Any], meter: Meter | None, case: Case, request: RunRequest
) -> Measured | None:
    if request.device == "cuda" and case.predicted_bytes > USABLE * _device_bytes():
        return None
    if request.method == "hia":
        model.adapter.encoder.fold_weights()  # drops what a CPU has packed for earlier cases' sizes
    return measure_prefill(model, inputs, meter, repeats=request.repeats, budget_s=request.budget_s)


def _capped(
    model: nn.Module, inputs: dict[str, Any], meter: Meter | None, case: Case, request: RunRequest
) -> Measured | None:
    cap = request.card_bytes
    if request.device != "cuda" or cap is None or case.predicted_bytes <= cap or cap > _device_bytes():
        return None
    with memory_cap(cap):
        return measure_prefill(model, inputs, meter, repeats=1, budget_s=0)


@contextmanager
def memory_cap(card_bytes: int) -> Iterator[None]:
    """Let this process allocate as much on the GPU as a card of that size has."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, card_bytes / _device_bytes()))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def _device_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory)


def run_in_subprocess(request: RunRequest) -> Iterator[RunResult]:
    """:func:`run_requests` in a fresh process, so that this one's memory disturbs nothing.

    Raises:
        RuntimeError: it failed; carries the end of what it said.
    """
    command = [sys.executable, "-m", "bench.table3.prefill", request.to_json()]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=REPOSITORY, env=_environment()
        )
        try:
            for line in process.stdout or ():
                if line.startswith("{"):
                    yield _result(json.loads(line))
            if process.wait():
                errors.seek(0)
                text = errors.read().strip()[-600:]
                raise RuntimeError(f"bench.table3.prefill: measuring {request.method} failed: {text}")
        finally:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    """This process's, with the packages it sees: they may stand on its path without being installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def _result(fields: dict[str, Any]) -> RunResult:
    for name in ("measured", "capped"):
        if fields[name] is not None:
            fields[name] = Measured(**{**fields[name], "times_ms": tuple(fields[name]["times_ms"])})
    return RunResult(**fields)


def main(arguments: list[str]) -> int:
    """Entry of the measuring process."""
    request = RunRequest.from_json(arguments[0])
    for result in run_requests(request):
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
