"""One question as a user asks it, in five ways of reading a large image: ``python -m bench end-to-end``.

Time to the first token, of a second question on the same images, of a decoded token and of a training step, and
peak memory. LLaVA-13B's shapes in bf16 on CUDA, the small host in fp32 on the CPU, both with random weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..measure import roofline as limits
from ..measure.memory import process_peak_unavailable
from ..measure.timing import Samples
from ..records import environment
from ..records.devices import DTYPES, torch_dtype
from ..records.record import Measurement, read_records, write_records
from ..table3.hosts import LLAVA_13B, SMALL_LLAVA
from ..workloads import images
from .subjects import (
    LABELS,
    OPS,
    PROVIDERS,
    Case,
    Setting,
    Subject,
    build,
    flops,
    free,
    not_offered,
    repeat_with_peak,
    resolution_seen,
)

RESOLUTIONS = {"cpu": (448, 896), "cuda": (896, 448, 1792)}
DEFAULT_DTYPE = {"cpu": "fp32", "cuda": "bf16"}
# the figures a reader looks for first come first: a deadline cuts the list from its end
ORDER = ("hia", "baseline", "released", "anyres", "plain")
SMALLEST, LARGEST = 224, 8192
CPU_DEADLINE_S, TIMED_SHARE = 900, 0.75


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parsed and checked flags.

    Raises:
        SystemExit: a value that isn't allowed; the message names the flag, what it takes, and the nearest names.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench end-to-end",
        description="Time to first token, second question, decode, training step and memory of a whole MLLM.",
    )
    what = parser.add_argument_group("what is timed")
    what.add_argument(
        "--provider",
        nargs="+",
        default=list(PROVIDERS),
        metavar="NAME",
        help="; ".join(LABELS.values()) + " (default: all)",
    )
    what.add_argument("--op", nargs="+", default=list(OPS), metavar="NAME", help=f"{', '.join(OPS)} (default: all)")
    what.add_argument(
        "--resolutions",
        nargs="+",
        metavar="PX",
        help="sides of the images (default: 448 896 on the CPU, 896 448 1792 on CUDA)",
    )
    what.add_argument("--batch", nargs="+", default=["1", "4"], metavar="N", help="prompts at a time (default: 1 4)")
    what.add_argument("--images-per-prompt", default="2", metavar="N", help="default: 2, a comparison")
    what.add_argument("--text-tokens", default="60", metavar="N", help="tokens beside the images' (default: 60)")
    what.add_argument("--new-tokens", default="8", metavar="N", help="decode steps a repetition (default: 8)")
    what.add_argument("--dtype", metavar="DTYPE", help="bf16, fp16, fp32 (default: fp32 on the CPU, bf16 on CUDA)")
    what.add_argument("--attention", default="sdpa", metavar="NAME", help="the host's: sdpa (default) or eager")
    run = parser.add_argument_group("how")
    run.add_argument("--device", default="auto", metavar="DEVICE", help="cpu, cuda; auto (default) prefers cuda")
    run.add_argument("--repeats", default="4", metavar="N", help="timed repetitions, at most (default: 4)")
    run.add_argument("--budget", default="10", metavar="S", help="seconds a case, roughly (default: 10)")
    run.add_argument(
        "--deadline",
        metavar="S",
        help="seconds for the whole run, memory last; what is left then is "
        "recorded so (default: 900 on the CPU, none on CUDA)",
    )
    run.add_argument(
        "--images",
        metavar="DIR",
        help="folder of radiographs (default: ../shared/data/images, or "
        "$HIA_TEST_DATA/images, where present; else generated phantoms)",
    )
    run.add_argument("--list", action="store_true", help="print the cases and stop")
    run.add_argument("--out", metavar="DIR", help="folder for end_to_end.json (default: bench/results/<device>)")
    run.add_argument("--json", metavar="PATH", help="write the records here too")
    options = parser.parse_args(arguments)
    try:
        return checked(options)
    except ValueError as error:
        parser.error(str(error))


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """Flags with values of their types.

    Raises:
        ValueError: names the flag.
    """
    (options.device,) = _names("--device", [options.device], ("auto", "cpu", "cuda"))
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available() and not options.list:
        raise ValueError("--device: cuda needs a CUDA device and a torch built for it, got none; use --device cpu")
    options.provider = _names("--provider", options.provider, PROVIDERS)
    options.op = _names("--op", options.op, OPS)
    (options.dtype,) = _names("--dtype", [options.dtype or DEFAULT_DTYPE[options.device]], tuple(DTYPES))
    (options.attention,) = _names("--attention", [options.attention], ("sdpa", "eager"))
    given = options.resolutions or [str(side) for side in RESOLUTIONS[options.device]]
    options.resolutions = _numbers("--resolutions", given, SMALLEST, LARGEST)
    options.batch = _numbers("--batch", options.batch, 1, 64)
    for name, low, high in (
        ("images_per_prompt", 1, 64),
        ("text_tokens", 8, 4096),
        ("new_tokens", 1, 512),
        ("repeats", 1, 1000),
        ("budget", 1, 3600),
    ):
        flag = "--" + name.replace("_", "-")
        setattr(options, name, _numbers(flag, [str(getattr(options, name))], low, high)[0])
    if options.deadline is None and options.device == "cpu":
        options.deadline = str(CPU_DEADLINE_S)
    if options.deadline is not None:
        (options.deadline,) = _numbers("--deadline", [options.deadline], 1, 86400)
    return options


def _names(flag: str, given: Iterable[str], allowed: Sequence[str]) -> tuple[str, ...]:
    values = [part for value in given for part in value.split(",") if part]
    for value in values:
        if value not in allowed:
            near = difflib.get_close_matches(value, allowed, n=2, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{flag}: must be among {', '.join(allowed)}, got {value!r}{hint}")
    if not values:
        raise ValueError(f"{flag}: must name at least one of {', '.join(allowed)}, got none")
    return tuple(name for name in allowed if name in values)


def _numbers(flag: str, given: Iterable[str], low: int, high: int) -> tuple[int, ...]:
    values = [part for value in given for part in value.split(",") if part]
    for value in values:
        if not value.isdigit() or not low <= int(value) <= high:
            raise ValueError(f"{flag}: must be a whole number from {low} to {high}, got {value!r}")
    if not values:
        raise ValueError(f"{flag}: must name at least one number, got none")
    return tuple(dict.fromkeys(int(value) for value in values))


def plan(options: argparse.Namespace) -> list[tuple[Case, tuple[str, ...]]]:
    """Cases and their providers, the most important first.

    On the CPU a case's providers take turns, so that drift hits all of them; on CUDA, where a second 13B model
    would not fit most cards, each provider goes through the cases of one batch size alone.
    """
    cases = [
        Case(op, resolution, batch, options.images_per_prompt)
        for batch in options.batch
        for op in options.op
        for resolution in options.resolutions
    ]
    wanted = tuple(name for name in ORDER if name in options.provider)
    if options.device == "cuda":
        alone = [(provider, batch) for batch in options.batch for provider in wanted]
        return [(case, (provider,)) for provider, batch in alone for case in cases if case.batch == batch]
    cases.sort(key=lambda case: case.batch * case.resolution**2)  # what takes longest comes last
    return [(case, wanted) for case in cases]


class Run:
    """Goes through a plan and keeps what was measured.

    Args:
        options: of :func:`parse`.
        setting: of the models.
        out: files to keep up to date.
    """

    def __init__(self, options: argparse.Namespace, setting: Setting, out: Sequence[Path]) -> None:
        self.options, self.setting, self.out = options, setting, out
        self.environment = environment.describe(options.device)
        self.environment["command"] = " ".join(["python -m bench end-to-end", *sys.argv[1:]])
        self.limits = limits.measure(options.device, [options.dtype])
        self.environment["limits"] = self.limits.to_dict()
        self.records: list[Measurement] = []
        self._models: dict[str, Any] = {}
        # on the CPU peaks are measured by themselves, after the times
        timed = None if options.deadline is None else options.deadline * (TIMED_SHARE if options.device == "cpu" else 1)
        self._end = None if timed is None else time.monotonic() + timed
        self._last = None if options.deadline is None else time.monotonic() + options.deadline
        self._longest = 0.0
        self.earlier = [record for record in _read(out[0]) if record.device == options.device]

    def go(self, steps: Sequence[tuple[Case, tuple[str, ...]]]) -> None:
        """Measure every step; a failure is a row and the next step goes on."""
        for number, (case, providers) in enumerate(steps):
            left = None if self._end is None else self._end - time.monotonic()
            rest = "" if left is None else f"; {max(0.0, left):.0f} s left"
            said = f"[{number + 1}/{len(steps)}] {case.op} {case.name}: {', '.join(providers)}{rest}"
            print(said, file=sys.stderr, flush=True)
            started = time.monotonic()
            if left is not None and left < 1.2 * self._longest + 1:
                new = [self._record(case, provider, reason=self._too_late()) for provider in providers]
            else:
                new = self._measure(case, providers)
                self._longest = max(self._longest, time.monotonic() - started)
            self.records += new
            for record in new:
                print("  " + line_of(record, self.records), flush=True)
            self.write()
        if self.options.device == "cpu":
            self._measure_peaks({case.name + case.op: case for case, _ in steps})

    def _measure_peaks(self, cases: dict[str, Case]) -> None:
        """Peaks on the CPU come last: to measure them, malloc must be made to return memory, and stays so and slow."""
        if process_peak_unavailable() is not None:
            return
        for number, record in enumerate(self.records):
            if record.status != "ok" or (self._last is not None and time.monotonic() > self._last):
                continue
            case = cases[record.case + record.op]
            print(
                f"[{number + 1}/{len(self.records)}] memory: {record.provider} {case.op} {case.name}",
                file=sys.stderr,
                flush=True,
            )
            self.records[number] = self._with_peak(record, case)
            self.write()

    def _with_peak(self, record: Measurement, case: Case) -> Measurement:
        """The record with the peak of one more repetition; where that fails, a failure."""
        subject = None
        try:
            subject = Subject(record.provider, self._model(record.provider, False), self.setting, case)
            _, peak = repeat_with_peak(subject)
        except Exception as error:
            failed = self._record(case, record.provider, error=error)
            print("  " + line_of(failed, self.records), flush=True)
            return failed
        finally:
            if subject is not None:
                self._close(subject)
        total = None if peak is None else record.extra["model_bytes"] + peak
        return dataclasses.replace(record, peak_bytes=peak, extra=record.extra | {"total_bytes": total})

    def write(self) -> None:
        """Bring the files up to date: this run's records, and earlier ones of other cases."""
        fresh = {record.key for record in self.records if record.status != "unavailable"}
        known = {record.key for record in self.earlier}
        kept = [record for record in self.earlier if record.key not in fresh]
        new = [record for record in self.records if record.key in fresh or record.key not in known]
        for path in self.out:
            write_records(path, [*kept, *new])

    def _measure(self, case: Case, providers: Sequence[str]) -> list[Measurement]:
        found: dict[str, Measurement] = {}
        subjects: dict[str, Subject] = {}
        peaks: dict[str, int | None] = {}
        first: dict[str, float] = {}
        times: dict[str, list[float]] = {}
        alone = len(providers) == 1
        try:
            for provider in providers:
                reason = not_offered(provider, case)
                if reason is not None:
                    found[provider] = self._record(case, provider, reason=reason)
                    continue
                if self._over():
                    found[provider] = self._record(case, provider, reason=self._too_late())
                    continue
                try:
                    subjects[provider] = Subject(provider, self._model(provider, alone), self.setting, case)
                    started = time.monotonic()
                    peaks[provider] = self._warm_up(subjects[provider])
                    first[provider] = time.monotonic() - started
                    times[provider] = []
                except Exception as error:
                    found[provider] = self._record(case, provider, error=error)
                    if provider not in subjects:  # who knows how far it came
                        self._models.pop(provider, None)
            broken = self._take_turns(subjects, first, times)
            for provider, milliseconds in times.items():
                if provider in broken:
                    found[provider] = self._record(case, provider, error=broken[provider])
                elif not milliseconds:
                    found[provider] = self._record(case, provider, reason=self._too_late())
                else:
                    found[provider] = self._timed_or_failed(case, subjects[provider], milliseconds, peaks[provider])
        finally:
            for subject in subjects.values():
                self._close(subject)
            free(self.options.device)
        return [found[provider] for provider in providers]

    def _warm_up(self, subject: Subject) -> int | None:
        """The first repetition, which is not timed; its peak where that costs nothing."""
        if self.options.device == "cuda":
            return repeat_with_peak(subject)[1]
        subject.repetition()
        return None

    def _take_turns(
        self, subjects: dict[str, Subject], first: dict[str, float], times: dict[str, list[float]]
    ) -> dict[str, Exception]:
        """A B C A B C, at least twice each, until the budget is spent; the deadline ends it anywhere.

        Returns:
            What those raised that are broken; they have no more turns.
        """
        broken: dict[str, Exception] = {}
        seconds = sum(first.values())
        rounds = int(max(2, min(self.options.repeats, self.options.budget / seconds))) if seconds else 0
        for _ in range(rounds):
            for provider in times:
                if provider in broken or self._over():
                    continue
                try:
                    times[provider] += subjects[provider].repetition()
                except Exception as error:
                    # its frames hold what it had allocated, which the others need
                    broken[provider] = error.with_traceback(None)
                    self._close(subjects[provider])
                    free(self.options.device)
        return broken

    def _close(self, subject: Subject) -> None:
        """Leave its model as it was; one that can't be left so is built anew for the next case."""
        try:
            subject.close()
        except Exception as error:
            print(f"  {subject.provider} is built anew: {describe_error(error)}", file=sys.stderr, flush=True)
            self._models.pop(subject.provider, None)

    def _over(self) -> bool:
        return self._end is not None and time.monotonic() > self._end

    def _too_late(self) -> str:
        return f"--deadline: {self.options.deadline} s were over before its turn"

    def _model(self, provider: str, alone: bool) -> Any:
        if provider not in self._models:
            if alone:
                self._models.clear()
                free(self.options.device)
            self._models[provider] = build(provider, self.setting)
        return self._models[provider]

    def _timed_or_failed(self, case: Case, subject: Subject, times: list[float], peak: int | None) -> Measurement:
        try:
            return self._timed(case, subject, times, peak)
        except Exception as error:
            return self._record(case, subject.provider, error=error)

    def _timed(self, case: Case, subject: Subject, times: list[float], peak: int | None) -> Measurement:
        samples = Samples(times)
        p20, p50, p80 = (samples.percentile(percent) for percent in (20, 50, 80))
        own, moved = subject.own_bytes(), subject.least_bytes()
        counted = flops(subject.provider, self.setting, case)
        roofline = None if case.op == "train_step" else self.limits.roofline_ms(counted or 0, moved, self.options.dtype)
        if case.op == "second_question":  # without its FLOPs there is no roofline
            roofline = None
        extra = self._extra(case, subject.provider) | {
            "prompt_tokens": subject.tokens,
            "model_bytes": own,
            "total_bytes": None if peak is None else own + peak,
        }
        if case.op == "decode":
            extra["tokens_per_s"] = case.batch / p50 * 1e3
        if case.op == "train_step":
            extra["trained_parameters"] = sum(parameter.numel() for parameter in subject.trained())
            extra["checkpointing"] = self.setting.checkpointing
        return Measurement(
            "end_to_end",
            case.op,
            case.name,
            subject.provider,
            case.mode,
            self.options.dtype,
            self.options.device,
            "ok",
            None,
            p20,
            p50,
            p80,
            samples.noisy,
            len(times),
            counted,
            moved,
            roofline,
            None if roofline is None else 100 * roofline / p50,
            peak,
            extra,
            self.environment,
        )

    def _record(
        self, case: Case, provider: str, *, reason: str | None = None, error: Exception | None = None
    ) -> Measurement:
        """A row without a number: unavailable for a reason, failed with an error."""
        status = "unavailable"
        if error is not None:
            status = "failed"
            reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else describe_error(error)
        return Measurement(
            "end_to_end",
            case.op,
            case.name,
            provider,
            case.mode,
            self.options.dtype,
            self.options.device,
            status,
            reason,
            extra=self._extra(case, provider),
            environment=self.environment,
        )

    def _extra(self, case: Case, provider: str) -> dict[str, Any]:
        return {
            "host": self.setting.spec.name,
            "resolution": case.resolution,
            "batch": case.batch,
            "images": case.images,
            "resolution_seen": resolution_seen(provider, case.resolution),
            "attention": self.setting.attention,
            "pictures": self.setting.source.kind,
        }


def describe_error(error: Exception) -> str:
    """The kind of error and its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0] or 'no message'}"[:400]


def line_of(record: Measurement, records: Sequence[Measurement]) -> str:
    """A record as a line of the terminal; times beside ours where ours is known."""
    if record.status != "ok" or record.p50_ms is None:
        return f"{record.provider:<9} {record.status}: {record.reason}"
    line = f"{record.provider:<9} {record.p50_ms:10.1f} ms"
    total = record.extra.get("total_bytes")
    line += "" if total is None else f"  {total / 1e9:6.2f} GB"
    if record.op == "decode":
        line += f"  {record.extra['tokens_per_s']:.1f} tokens/s"
    ours = next((r for r in records if r.provider == "hia" and (r.op, r.case) == (record.op, record.case)), None)
    if ours is not None and ours is not record and ours.p50_ms:
        line += f"  {record.p50_ms / ours.p50_ms:.2f} x hia"
    return line + ("  noisy" if record.noisy else "")


def _read(path: Path) -> list[Measurement]:
    """Records of an earlier run; none where there is no file."""
    return read_records(path) if path.exists() else []


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write as it goes.

    Returns:
        0; 1 if something failed that should run; 130 after Ctrl-C, with what was measured written.
    """
    options = parse(arguments)
    steps = plan(options)
    if options.list:
        for case, providers in steps:
            for provider in providers:
                print(f"{case.op:<20} {case.name:<18} {provider:<9} {not_offered(provider, case) or ''}".rstrip())
        return 0
    try:
        source = images.find_images(options.images)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    spec = LLAVA_13B if options.device == "cuda" else SMALL_LLAVA
    text = images.prompt_text(options.text_tokens, spec.image_token)
    setting = Setting(
        spec,
        torch_dtype(options.dtype),
        options.device,
        options.attention,
        source,
        text.ids,
        options.new_tokens,
        checkpointing=options.device == "cuda",
    )
    folder = environment.REPOSITORY / "bench" / "results" / environment.slug(environment.device_name(options.device))
    out = [Path(options.out or folder) / "end_to_end.json", *([Path(options.json)] if options.json else [])]
    print(
        f"{spec.name}, random {options.dtype} weights, {options.device}, {torch.get_num_threads()} threads; "
        f"{source.note}; text by {text.tokenizer}"
    )
    run = None
    try:
        run = Run(options, setting, out)
        run.go(steps)
    except KeyboardInterrupt:
        if run is None:
            print("interrupted before anything was measured; nothing is written")
        else:
            run.write()
            print("interrupted; what was measured is written")
        return 130
    print(f"written: {', '.join(os.path.relpath(path) for path in out)}")
    return 1 if any(record.status == "failed" and record.reason != "out of memory" for record in run.records) else 0


if __name__ == "__main__":
    sys.exit(main())
