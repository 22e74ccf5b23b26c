"""The paper's Table 3, recomputed beside the paper's figures: ``python -m bench table3``.

FLOPs and memory of the 13B host are followed under fake tensors on any machine; what the machine can hold is
really run: the 13B host on CUDA, a small host of the same architecture on the CPU.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..cli import BadOption, device_of, numbers, some_of
from ..measure.memory import process_peak_unavailable
from ..progress import Progress, console_for
from ..records import environment
from ..records.devices import torch_dtype
from ..records.files import results_folder, write_json
from ..records.resume import is_same_run, read_earlier
from ..workloads import images as pictures
from . import formulas, paper
from .hosts import LLAVA_13B, SMALL_LLAVA, HostSpec, host_from_file
from .methods import METHODS, sequence_length
from .output import JSON, add_notes, print_report, write_report
from .predict import Prediction, Task, predict_in_worker, start_worker
from .prefill import Case, Measured, RunRequest, RunResult, run_in_subprocess
from .rows import BYTES_PER_GB, Protocol, Report, Row, predicted_row

RESOLUTIONS = (448, 560, 672, 784, 896, 1344, 2016, 4096)
SMALLEST, LARGEST = 224, 16384
ATTENTIONS = ("eager", "sdpa")
PROCESSES = 2  # predictions at a time; each needs about 1 GB of memory
SMALL_HOST_LIMIT = 12 * 2**30
MEASURED_ON_CPU = ("baseline", "hia")


@dataclass(frozen=True)
class Options:
    """A run, checked.

    Attributes:
        methods: of ``methods.METHODS``.
        resolutions: ascending, pixels.
        protocol: what is counted.
        device: "cpu" or "cuda".
        skip_measured: predict only.
        folder: of the radiographs; None takes the default.
        source: the images found there.
    """

    methods: tuple[str, ...]
    resolutions: tuple[int, ...]
    protocol: Protocol
    device: str
    skip_measured: bool
    folder: str | None
    source: pictures.ImageSource


def make_options(
    *,
    methods: Iterable[str] | None,
    resolutions: Iterable[str] | None,
    attention: Iterable[str] | None,
    host_config: Path | None,
    device: str,
    skip_measured: bool,
    images: Path | None,
    protocol: dict[str, Any],
) -> Options:
    """Check what was typed.

    Raises:
        BadOption: a value that isn't allowed; the message names the option, what it takes, and the nearest names.
    """
    chosen = some_of("--attention", attention, ATTENTIONS) if attention else ATTENTIONS
    try:
        host = LLAVA_13B if host_config is None else host_from_file(host_config)
        source = pictures.find_images(images)
    except (ValueError, OSError) as error:
        raise BadOption(str(error)) from error
    return Options(
        some_of("--methods", methods, METHODS) if methods else METHODS,
        tuple(sorted(numbers("--resolutions", resolutions, SMALLEST, LARGEST))) if resolutions else RESOLUTIONS,
        Protocol(**protocol, attention=chosen, host=host),
        device_of(device),
        skip_measured,
        None if images is None else str(images),
        source,
    )


def run(
    options: Options,
    *,
    out: Path | None = None,
    record: bool = False,
    json: Path | None = None,
    resume: bool = False,
) -> int:
    """Run, print, write.

    Args:
        options: of :func:`make_options`.
        out: folder of table3.json, .md and .png.
        record: write them to bench/results.
        json: write the JSON here too.
        resume: run nothing again that was run at this commit on this device.

    Returns:
        0; 1 if a check or a method's runs failed; 130 after Ctrl-C, with what was done written.
    """
    started = time.perf_counter()
    report = Report(options.protocol, environment=environment.describe(options.device))
    folder = results_folder(report.environment["device"], out=out, record=record)
    if resume:
        images = images_of(options.source, options.protocol.images_per_sample)
        report.measured += earlier_rows(folder / JSON, report, images)
    tasks = prediction_tasks(options)
    try:
        with Progress(len(tasks)) as progress:
            predictions = predict_all(tasks, report, progress)
            if not options.skip_measured:
                measure_all(options, predictions, report, progress, folder / JSON)
    except KeyboardInterrupt:
        report.interrupted = True
    report.rows.sort(key=lambda row: (row.resolution, METHODS.index(row.method), row.attention))
    report.wall_s = time.perf_counter() - started
    add_notes(report, options.source.note)
    written = write_report(report, folder, json)
    console = console_for(sys.stdout)
    print_report(report, console)
    paths = ", ".join(os.path.relpath(path) for path in written)
    console.print(f"{report.wall_s:.0f} s; written: {paths}", highlight=False, soft_wrap=True)
    if report.interrupted:
        return 130
    return 1 if report.failed or any(claim.passed is False for claim in report.claims()) else 0


def earlier_rows(path: Path, report: Report, images: dict[str, Any]) -> list[Row]:
    """Read the rows that were really run at this commit on this device, in this protocol, with these images.

    Args:
        path: of table3.json.
        report: of this run.
        images: as its "images" has them, less the tokenizer.
    """

    def asked(protocol: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in protocol.items() if name != "attention"}

    def parse(content: Any) -> list[Row]:
        same = is_same_run(content["environment"], report.environment)
        same = same and asked(content["protocol"]) == asked(report.protocol.to_dict())
        same = same and {name: content["images"].get(name) for name in images} == images
        return [Row(**row) for row in content["measured"]] if same else []

    return read_earlier(path, parse, [])


def images_of(source: pictures.ImageSource, count: int) -> dict[str, Any]:
    """Describe the images of a sample."""
    return {"kind": source.kind, "files": source.names(count)}


def prediction_tasks(options: Options) -> list[Task]:
    """List the 13B host's tasks, a method's together; then the small host's, for the runs on the CPU."""
    protocol = options.protocol
    counts = (protocol.images_per_sample, protocol.text_tokens)
    large = [
        Task(method, resolution, protocol.attention, protocol.host, torch_dtype(protocol.dtype), *counts, cuda=True)
        for method in options.methods
        for resolution in options.resolutions
    ]
    if options.skip_measured or options.device == "cuda":
        return large
    return large + [
        Task(method, resolution, attentions, SMALL_LLAVA, torch_dtype("fp32"), *counts, cuda=False)
        for method in MEASURED_ON_CPU
        if method in options.methods
        for resolution, attentions in small_host_cases(options.resolutions, protocol.attention)
    ]


def small_host_cases(resolutions: tuple[int, ...], attention: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """Return the paper's resolutions with the last attention named; the others at the smallest one, to save time."""
    wanted = [resolution for resolution in resolutions if resolution in paper.RESOLUTIONS]
    return [(resolution, attention if resolution == wanted[0] else attention[-1:]) for resolution in wanted]


def predict_all(tasks: list[Task], report: Report, progress: Progress) -> list[Prediction]:
    """Follow all tasks in a few processes; the 13B host's become the report's rows."""
    predictions: list[Prediction] = []
    progress.step("starting the predictions")
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
            progress.done()
            progress.step(f"predicted {task.method} at {task.resolution} px, {task.host.name.split(' (')[0]}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
    return predictions


def rows_of(prediction: Prediction, protocol: Protocol) -> list[Row]:
    """Make one row an attention."""
    task = prediction.task
    tokens = sequence_length(task.method, task.resolution, task.images, task.text_tokens)
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
    options: Options, predictions: list[Prediction], report: Report, progress: Progress, path: Path
) -> None:
    """Really run what the device can hold, and was not run before; the JSON is written after each method."""
    known = {row.key for row in report.measured}
    device, source = options.device, options.source
    host = options.protocol.host if device == "cuda" else SMALL_LLAVA
    text = pictures.prompt_text(options.protocol.text_tokens, host.image_token)
    report.images = {**images_of(source, options.protocol.images_per_sample), "tokenizer": text.tokenizer}
    report.measured_host = describe_host(host, device, options.protocol)
    wanted = [prediction for prediction in predictions if prediction.task.cuda == (device == "cuda")]
    for method in options.methods:
        own = sorted((p for p in wanted if p.task.method == method), key=lambda p: p.task.resolution)
        cases, too_large = runnable(own, device)
        report.skipped += too_large
        cases = [case for case in cases if (case.resolution, method, case.attention) not in known]
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
            options.folder,
            options.protocol.card_bytes if device == "cuda" else None,
        )
        progress.step(f"running {method}, {len(cases)} cases on the {device}")
        run_method(request, own, report, progress)
        write_json(path, report.to_dict())


def describe_host(host: HostSpec, device: str, protocol: Protocol) -> str:
    """Say in words what is run."""
    if device == "cuda":
        return f"{host.name}, random {protocol.dtype} weights, on CUDA"
    reason = process_peak_unavailable()
    peak = "peak memory is VmHWM" if reason is None else f"peak memory not measured: {reason}"
    return f"{host.name} of about 100 M parameters, random fp32 weights, on the CPU; {peak}"


def runnable(predictions: list[Prediction], device: str) -> tuple[list[Case], list[str]]:
    """Return the cases whose predicted peak this machine can hold, and why others are left out; CUDA decides itself."""
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


def run_method(request: RunRequest, predictions: list[Prediction], report: Report, progress: Progress) -> None:
    """Make one method's runs; a failure is recorded and the other methods go on."""
    by_resolution = {prediction.task.resolution: prediction for prediction in predictions}
    try:
        for result in run_in_subprocess(request):
            prediction = by_resolution[result.resolution]
            report.measured += measured_rows(result, prediction, report)
            progress.detail(f"{result.resolution} px, {result.attention} done")
    except RuntimeError as error:
        report.skipped.append(str(error))
        report.failed = True


def measured_rows(result: RunResult, prediction: Prediction, report: Report) -> list[Row]:
    """Make the rows of a result: of the run without a cap, and of the one under the card's cap."""
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
