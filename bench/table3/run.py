"""The paper's Table 3, recomputed beside the paper's figures: ``python -m bench table3``.

FLOPs and memory of the 13B host are followed under fake tensors on any machine; what the machine can hold is
really run: the 13B host on CUDA, a small host of the same architecture on the CPU.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..measure.memory import process_peak_unavailable
from ..records import environment
from ..workloads import images
from . import formulas, methods, paper
from .hosts import LLAVA_13B, SMALL_LLAVA, HostSpec
from .options import parse
from .output import console_for, print_report, write_report
from .predict import Prediction, Task, predict_in_worker, start_worker
from .prefill import Case, Measured, RunRequest, RunResult, run_in_subprocess
from .rows import BYTES_PER_GB, DTYPES, Protocol, Report, Row, predicted_row

PROCESSES = 2  # predictions at a time; each needs about 1 GB of memory
SMALL_HOST_LIMIT = 12 * 2**30
MEASURED_ON_CPU = ("baseline", "hia")


class Steps:
    """A progress bar that says what is being done; silent where there is no terminal."""

    def __init__(self, console: Console, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("starting", total=total)

    @contextmanager
    def shown(self) -> Iterator[Steps]:
        """Show the bar inside the block."""
        with self._bar:
            yield self

    def now(self, what: str, done: int = 0) -> None:
        """Say what is being done, after ``done`` more steps."""
        self._bar.update(self._task, description=what, advance=done)


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write.

    Returns:
        0; 1 if a check failed; 130 after Ctrl-C, with what was done written.
    """
    options = parse(arguments)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("--device: cuda needs a CUDA device and a torch built for it, got none; use --device cpu\n")
        return 2
    try:
        source = images.find_images(options.images)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    started = time.perf_counter()
    console = console_for(sys.stdout)
    report = Report(options.protocol, environment=environment.describe(device))
    tasks = prediction_tasks(options, device)
    try:
        with Steps(console_for(sys.stderr), len(tasks)).shown() as steps:
            predictions = predict_all(tasks, report, steps)
            if not options.skip_measured:
                measure_all(options, device, source, predictions, report, steps)
    except KeyboardInterrupt:
        report.interrupted = True
    report.rows.sort(key=lambda row: (row.resolution, methods.METHODS.index(row.method), row.attention))
    report.wall_s = time.perf_counter() - started
    report.notes += notes(report, source)
    folder = Path(options.out) if options.out else default_folder(report)
    written = write_report(report, folder, Path(options.json) if options.json else None)
    print_report(report, console)
    console.print(f"{report.wall_s:.0f} s; written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    if report.interrupted:
        return 130
    return 1 if any(claim.passed is False for claim in report.claims()) else 0


def default_folder(report: Report) -> Path:
    """bench/results/<device>."""
    return environment.REPOSITORY / "bench" / "results" / environment.slug(report.environment["device"])


def prediction_tasks(options: Any, device: str) -> list[Task]:
    """The 13B host's tasks, a method's together; then the small host's, for the runs on the CPU."""
    protocol: Protocol = options.protocol
    counts = (protocol.images_per_sample, protocol.text_tokens)
    large = [
        Task(method, resolution, protocol.attention, protocol.host, DTYPES[protocol.dtype], *counts, cuda=True)
        for method in options.methods
        for resolution in options.resolutions
    ]
    if options.skip_measured or device == "cuda":
        return large
    return large + [
        Task(method, resolution, attentions, SMALL_LLAVA, torch.float32, *counts, cuda=False)
        for method in MEASURED_ON_CPU
        if method in options.methods
        for resolution, attentions in small_host_cases(options.resolutions, protocol.attention)
    ]


def small_host_cases(resolutions: tuple[int, ...], attention: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """The paper's resolutions with the last attention named; the others at the smallest one, to save time."""
    wanted = [resolution for resolution in resolutions if resolution in paper.RESOLUTIONS]
    return [(resolution, attention if resolution == wanted[0] else attention[-1:]) for resolution in wanted]


def predict_all(tasks: list[Task], report: Report, steps: Steps) -> list[Prediction]:
    """All tasks in a few processes; the 13B host's become the report's rows."""
    predictions: list[Prediction] = []
    steps.now("starting")
    context = multiprocessing.get_context("spawn")
    workers = min(PROCESSES, os.cpu_count() or 1, len(tasks))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    try:
        for future in as_completed([pool.submit(predict_in_worker, task) for task in tasks]):
            prediction = future.result()
            predictions.append(prediction)
            task = prediction.task
            if task.cuda:
                report.rows += rows_of(prediction, report.protocol)
            steps.now(f"predicted {task.method} at {task.resolution} px, {task.host.name.split(' (')[0]}", done=1)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
    return predictions


def rows_of(prediction: Prediction, protocol: Protocol) -> list[Row]:
    """One row an attention."""
    task = prediction.task
    tokens = methods.sequence_length(task.method, task.resolution, task.images, task.text_tokens)
    formula = formulas.prefill_flops(
        task.method,
        task.host,
        task.resolution,
        task.images,
        task.text_tokens,
        device="cuda" if task.cuda else "cpu",
        itemsize=task.dtype.itemsize,
    )
    return [
        predicted_row((task.resolution, task.method, name), footprint, prediction.flops, formula, tokens, protocol)
        for name, footprint in prediction.footprints.items()
    ]


def measure_all(
    options: Any, device: str, source: images.ImageSource, predictions: list[Prediction], report: Report, steps: Steps
) -> None:
    """Really run what the device can hold."""
    host = options.protocol.host if device == "cuda" else SMALL_LLAVA
    text = images.prompt_text(options.protocol.text_tokens, host.image_token)
    names = source.names(options.protocol.images_per_sample)
    report.images = {"kind": source.kind, "files": names, "tokenizer": text.tokenizer}
    report.measured_host = describe_host(host, device, options.protocol)
    wanted = [prediction for prediction in predictions if prediction.task.cuda == (device == "cuda")]
    for method in options.methods:
        own = sorted((p for p in wanted if p.task.method == method), key=lambda p: p.task.resolution)
        cases, too_large = runnable(own, device)
        report.skipped += too_large
        if not cases:
            continue
        dtype = options.protocol.dtype if device == "cuda" else "fp32"
        request = RunRequest(
            method,
            asdict(host),
            dtype,
            device,
            tuple(cases),
            options.protocol.images_per_sample,
            options.protocol.text_tokens,
            options.images,
            options.protocol.card_bytes if device == "cuda" else None,
        )
        steps.now(f"running {method}, {len(cases)} cases on the {device}")
        run_method(request, own, report, steps)


def describe_host(host: HostSpec, device: str, protocol: Protocol) -> str:
    """What is run, in words."""
    if device == "cuda":
        return f"{host.name}, random {protocol.dtype} weights, on CUDA"
    reason = process_peak_unavailable()
    peak = "peak memory is VmHWM" if reason is None else f"peak memory not measured: {reason}"
    return f"{host.name} of about 100 M parameters, random fp32 weights, on the CPU; {peak}"


def runnable(predictions: list[Prediction], device: str) -> tuple[list[Case], list[str]]:
    """Cases whose predicted peak this machine can hold, and why the others are left out. CUDA decides for itself."""
    limit = SMALL_HOST_LIMIT if device == "cpu" else sys.maxsize
    cases, too_large = [], []
    for prediction in predictions:
        for attention, footprint in prediction.footprints.items():
            case = Case(prediction.task.resolution, attention, footprint.peak_bytes)
            if footprint.peak_bytes <= limit:
                cases.append(case)
            else:
                need = footprint.peak_bytes / BYTES_PER_GB
                too_large.append(f"{prediction.task.method} {case.resolution} {attention}: needs {need:.1f} GB")
    return cases, too_large


def run_method(request: RunRequest, predictions: list[Prediction], report: Report, steps: Steps) -> None:
    """One method's runs; a failure is recorded and the other methods go on."""
    by_resolution = {prediction.task.resolution: prediction for prediction in predictions}
    try:
        for result in run_in_subprocess(request):
            prediction = by_resolution[result.resolution]
            report.measured += measured_rows(result, prediction, report)
            steps.now(f"ran {request.method} at {result.resolution} px, {result.attention}")
    except RuntimeError as error:
        report.skipped.append(str(error))


def measured_rows(result: RunResult, prediction: Prediction, report: Report) -> list[Row]:
    """Rows of a result: the run without a cap, and the one under the card's cap."""
    task = prediction.task
    case = (result.resolution, task.method, result.attention)
    footprint = prediction.footprints[result.attention]
    protocol = replace(report.protocol, host=task.host)
    (template,) = [row for row in rows_of(prediction, protocol) if row.key == case]
    if not task.cuda:  # the paper's figures are no small host's
        template = replace(template, paper_flops_t=None, paper_memory_gb=None, paper_out_of_memory=False)
    if result.measured is None:
        report.skipped.append(
            f"{task.method} {result.resolution} {result.attention}: predicted to need "
            f"{footprint.peak_bytes / BYTES_PER_GB:.0f} GB, more than the device has"
        )
    runs = [run for run in (result.measured, result.capped) if run is not None]
    return [_measured_row(template, run, footprint.peak_bytes, protocol) for run in runs]


def _measured_row(template: Row, run: Measured, predicted: int, protocol: Protocol) -> Row:
    fits = None if run.memory_bytes is None else run.memory_bytes <= protocol.card_bytes
    return replace(
        template,
        memory_bytes=run.memory_bytes,
        memory_kind=run.memory_kind,
        prefill_ms=run.prefill_ms,
        fits=False if run.out_of_memory else fits,
        predicted_bytes=predicted,
    )


def notes(report: Report, source: images.ImageSource) -> list[str]:
    """What a reader must know to use the numbers."""
    protocol = report.protocol
    lines = [
        f"protocol: {protocol.host.name}, {protocol.images_per_sample} images and {protocol.text_tokens} text tokens "
        f"in one sample, {protocol.dtype}, prefill with KV cache, logits of the last token. {protocol.unit} shown; "
        f"1 multiply-add is 2 FLOPs; matrix products and convolutions counted, attention in full.",
        "the paper doesn't say whether it counts FLOPs or multiply-adds, one image or two, eager or fused attention, "
        "with or without a KV cache; the ratio baseline / HiA doesn't depend on the first of these.",
        f"GB are 1e9 bytes: the stricter reading of the paper's GB and of a {protocol.card_gb:g} GB card."
        + readings_differ(report),
        "memory is weights, activations, KV cache and inputs; kernels' own workspace, the CUDA context and "
        "fragmentation come on top. SDPA is followed as on CUDA: the flash kernel, or the memory-efficient one under "
        "a mask. transformers keeps every CLIP layer's output until the projector has run.",
    ]
    if protocol.host == LLAVA_13B:
        lines.append("the vocabulary is LLaMA-2's 32,000; Chinese-LLaMA-2's 55,296 would add 0.48 GB in 16 bits.")
    baseline = [row for row in report.rows if row.method == "baseline"]
    beyond = sorted(row.resolution for row in baseline if row.tokens > protocol.host.context)
    if beyond:
        lines.append(
            f"with {protocol.images_per_sample} images the baseline's sequence exceeds the LLM's "
            f"{protocol.host.context:,}-token context from {beyond[0]} px on; the paper's convention is unknown."
        )
    if any(row.method == "anyres" for row in report.rows):
        lines.append("anyres is cut into the same tiles at every size from 448 px on, so its cost stays the same.")
    if any(row.method == "released" for row in report.rows):
        lines.append("released is our port of that code's maths, with random weights; no code was copied.")
    if report.measured_host is not None:
        lines.append(f"images of the real runs: {source.note}; text by {report.images.get('tokenizer')}.")
    return lines


def readings_differ(report: Report) -> str:
    """Rows that would fit if the card's GB were GiB."""
    card = report.protocol.card_gb * 2**30
    rows = [row for row in report.rows if not row.fits and row.memory_bytes is not None and row.memory_bytes <= card]
    if not rows:
        return " No row's x depends on it."
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(f"{row.method} ({row.attention})", []).append(str(row.resolution))
    listed = "; ".join(f"{name} at {', '.join(sizes)}" for name, sizes in groups.items())
    return f" In GiB these would fit too: {listed}."


if __name__ == "__main__":
    sys.exit(main())
