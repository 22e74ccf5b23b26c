"""One question as a user asks it, in five ways of reading a large image: ``python -m bench end-to-end``.

Time to the first token, of a second question on the same images, of a decoded token and of a training step, and
peak memory. LLaVA-13B's shapes in bf16 on CUDA, the small host in fp32 on the CPU, both with random weights.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..measure import roofline
from ..measure.memory import process_peak_unavailable
from ..progress import Progress
from ..records import environment
from ..records.devices import torch_dtype
from ..records.files import results_folder
from ..records.record import Measurement, read_records, write_records
from ..records.resume import UNFINISHED, standing, was_reached
from ..table3.hosts import LLAVA_13B, SMALL_LLAVA
from ..workloads import images
from .plan import Options, Step, plan
from .rows import Rows, describe_error, line_of
from .subjects import Case, Setting, Subject, build, free, not_offered, repeat_with_peak

TIMED_SHARE = 0.75  # of a deadline, on the CPU, where peaks are measured by themselves after the times


class Run:
    """Goes through a plan and keeps what was measured.

    Args:
        options: of the run.
        setting: of the models.
        out: files to keep up to date.
        resume: measure nothing again that the first file holds of this commit on this device.
    """

    def __init__(self, options: Options, setting: Setting, out: Sequence[Path], *, resume: bool = False) -> None:
        self.options, self.setting, self.out = options, setting, out
        limits = roofline.measure(options.device, [options.dtype])
        facts = environment.describe(options.device) | {"limits": limits.to_dict()}
        self.rows = Rows(options, setting, limits, facts)
        self.records: list[Measurement] = []
        self._models: dict[str, Any] = {}
        timed = None if options.deadline is None else options.deadline * (TIMED_SHARE if options.device == "cpu" else 1)
        self._end = None if timed is None else time.monotonic() + timed
        self._last = None if options.deadline is None else time.monotonic() + options.deadline
        self._longest = 0.0
        self.earlier = [record for record in _read(out[0]) if record.device == options.device]
        rows = standing(self.earlier, facts) if resume else []
        alike = [record for record in rows if self.rows.asked.items() <= record.extra.items()]
        self._settled = {record.key for record in alike if record.status != "failed"}

    def go(self, steps: Sequence[Step]) -> None:
        """Measure every step; a failure is a row and the next step goes on."""
        with Progress(len(steps), left=self._left) as progress:
            for case, providers in steps:
                if all(self.rows.unavailable(case, name, "-").key in self._settled for name in providers):
                    progress.done()
                    continue
                progress.step(f"{case.op} {case.name}: {', '.join(providers)}")
                started, left = time.monotonic(), self._left()
                if left is not None and left < 1.2 * self._longest + 1:
                    new = [self.rows.unavailable(case, provider, self._too_late()) for provider in providers]
                else:
                    new = self._measure(case, providers)
                    self._longest = max(self._longest, time.monotonic() - started)
                self.records += new
                for record in new:
                    print(f"{case.op} {case.name}  {line_of(record, self.records)}", flush=True)
                self.write()
                progress.done()
        if self.options.device == "cpu":
            self._measure_peaks({case.name + case.op: case for case, _ in steps})

    def _left(self) -> float | None:
        return None if self._end is None else self._end - time.monotonic()

    def _measure_peaks(self, cases: dict[str, Case]) -> None:
        """Measure peaks on the CPU, last: for them malloc is made to return memory, and stays so and slow."""
        if process_peak_unavailable() is not None:
            return
        with Progress(len(self.records)) as progress:
            for number, record in enumerate(self.records):
                if record.status == "ok" and (self._last is None or time.monotonic() <= self._last):
                    case = cases[record.case + record.op]
                    progress.step(f"memory of {record.provider}, {case.op} {case.name}")
                    self.records[number] = self._with_peak(record, case)
                    self.write()
                progress.done()

    def _with_peak(self, record: Measurement, case: Case) -> Measurement:
        """Return the record with the peak of one more repetition; where that fails, a failure."""
        subject = None
        try:
            subject = Subject(record.provider, self._model(record.provider, False), self.setting, case)
            _, peak = repeat_with_peak(subject)
        except Exception as error:
            failed = self.rows.failed(case, record.provider, error)
            print(f"{case.op} {case.name}  {line_of(failed, self.records)}", flush=True)
            return failed
        finally:
            if subject is not None:
                self._close(subject)
        return self.rows.with_peak(record, peak)

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
                reason = not_offered(provider, case) or (self._too_late() if self._over() else None)
                if reason is not None:
                    found[provider] = self.rows.unavailable(case, provider, reason)
                    continue
                try:
                    subjects[provider] = Subject(provider, self._model(provider, alone), self.setting, case)
                    started = time.monotonic()
                    peaks[provider] = self._warm_up(subjects[provider])
                    first[provider] = time.monotonic() - started
                    times[provider] = []
                except Exception as error:
                    found[provider] = self.rows.failed(case, provider, error)
                    if provider not in subjects:  # who knows how far it came
                        self._models.pop(provider, None)
            broken = self._take_turns(subjects, first, times)
            for provider, milliseconds in times.items():
                if provider in broken:
                    found[provider] = self.rows.failed(case, provider, broken[provider])
                elif not milliseconds:
                    found[provider] = self.rows.unavailable(case, provider, self._too_late())
                else:
                    found[provider] = self.rows.timed(case, subjects[provider], milliseconds, peaks[provider])
        finally:
            for subject in subjects.values():
                self._close(subject)
            free(self.options.device)
        return [found[provider] for provider in providers]

    def _warm_up(self, subject: Subject) -> int | None:
        """Run the first repetition, which is not timed; its peak where that costs nothing."""
        if self.options.device == "cuda":
            return repeat_with_peak(subject)[1]
        subject.repetition()
        return None

    def _take_turns(
        self, subjects: dict[str, Subject], first: dict[str, float], times: dict[str, list[float]]
    ) -> dict[str, Exception]:
        """Repeat A B C A B C, at least twice each, until the budget is spent; the deadline ends it anywhere.

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


def _read(path: Path) -> list[Measurement]:
    """Read the records of an earlier run; none where there is no file."""
    return read_records(path) if path.exists() else []


def run(
    options: Options,
    *,
    out: Path | None = None,
    record: bool = False,
    json: Path | None = None,
    resume: bool = False,
) -> int:
    """Run, print, write as it goes.

    Args:
        options: of the run.
        out: folder of end_to_end.json.
        record: write it to bench/results.
        json: write the records here too.
        resume: measure nothing again that the file holds of this commit on this device.

    Returns:
        0; 1 if something failed that should run; 75 if a run that resumes did not reach everything; 130 after Ctrl-C,
        with what was measured written.
    """
    spec = LLAVA_13B if options.device == "cuda" else SMALL_LLAVA
    text = images.prompt_text(options.text_tokens, spec.image_token)
    setting = Setting(
        spec,
        torch_dtype(options.dtype),
        options.device,
        options.attention,
        options.source,
        text.ids,
        options.new_tokens,
        checkpointing=options.device == "cuda",
    )
    folder = results_folder(environment.device_name(options.device), out=out, record=record)
    files = [folder / "end_to_end.json", *([json] if json else [])]
    print(
        f"{spec.name}, random {options.dtype} weights, {options.device}, {torch.get_num_threads()} threads; "
        f"{options.source.note}; text by {text.tokenizer}"
    )
    running = None
    try:
        running = Run(options, setting, files, resume=resume)
        running.go(plan(options))
    except KeyboardInterrupt:
        if running is None:
            print("interrupted before anything was measured; nothing is written")
        else:
            running.write()
            print("interrupted; what was measured is written")
        return 130
    print(f"written: {', '.join(os.path.relpath(path) for path in files)}")
    failed = [one for one in running.records if one.status == "failed" and one.reason != "out of memory"]
    if failed:
        return 1
    return UNFINISHED if resume and not all(was_reached(one) for one in running.records) else 0
