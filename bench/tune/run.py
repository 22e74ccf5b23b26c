"""``python -m bench tune``: what is fastest on this GPU, kept in a file that launchers and backend tables read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hia_kernels.core import tuning
from hia_kernels.ops.conv_norm_act import inputs as convolution

from ..cli import some_of
from ..measure.timing import CudaClock, exact_matmuls, synchronize
from ..measure.worker import Channel, DeviceFailed, Isolated, Worker
from ..progress import Progress
from ..records import environment
from ..records.devices import torch_dtype
from ..records.files import read_json, results_folder, shown, write_json
from ..records.resume import UNFINISHED, is_same_run, read_earlier
from ..records.targets import importance
from ..workloads import CASES, RESOLUTIONS, Workload, gpu_workloads
from ..workloads.conv_norm_act import resnet50_shapes
from .ahead import print_compiled
from .race import race, race_attention, tune_shape
from .search import Tuned, tune_workload

FILE = "tuned.json"
Task = Workload | convolution.Shape  # whose keys are tuned, or at which backends race


class Session:
    """Runs tasks on the GPU, and hands over all that is known after each.

    Args:
        dtype: of the inputs.
        tuned: what is known before.
    """

    def __init__(self, dtype: str, tuned: Tuned) -> None:
        os.environ["HIA_TUNED"] = "1"
        self.dtype, self.tuned, self.clock = dtype, tuned, CudaClock()

    def run(self, task: Task, channel: Channel) -> None:
        """Run a task.

        Raises:
            DeviceFailed: a configuration broke the device.
        """
        with exact_matmuls():
            if isinstance(task, Workload):
                tune_workload(task, self.dtype, self.tuned, self.clock, begin=lambda name: channel.say(name, name))
                if task.op == "cross_attention":
                    channel.say(f"backends at {task.op} {task.name}")
                    race_attention(task, torch_dtype(self.dtype), self.tuned, self.clock)
            else:
                dtype = torch_dtype(self.dtype)
                tune_shape(task, dtype, self.tuned, self.clock, begin=lambda name: channel.say(name, name))
                channel.say(f"backends at {task}")
                race(task, dtype, self.tuned, self.clock)
        try:
            synchronize("cuda")
            torch.cuda.empty_cache()
        except Exception as raised:
            raise DeviceFailed(f"the device failed ({str(raised).partition(chr(10))[0]})") from raised
        channel.found(self.tuned)


@dataclass
class Found:
    """A tuning's findings so far; the channel of its tasks.

    Attributes:
        progress: told what is done.
        tuned: everything.
        failures: keys whose configurations broke the device, and why.
    """

    progress: Progress
    tuned: Tuned = field(default_factory=Tuned)
    failures: list[str] = field(default_factory=list)

    def say(self, text: str, who: str = "", seconds: float | None = None) -> None:
        """Show what is being done."""
        self.progress.detail(text)

    def found(self, item: Tuned) -> None:
        """Keep what is known, and print what is new."""
        for name in item.seen.keys() - self.tuned.seen.keys():
            gain = item.gains.get(name)
            print(f"{name}: " + (f"{item.configurations[name]}, {gain} times as fast" if gain else "as it is"))
        for name in item.backends.keys() - self.tuned.backends.keys():
            print(f"{name}: {item.backends[name]}, {item.gains[name]} times as fast")
        self.tuned = item


def tasks_of(ops: Iterable[str], cases: Sequence[str] = ()) -> list[Task]:
    """List the tasks of some ops: the encoder's convolutions, then the GPU's workloads; the usual sizes first.

    The first task that meets a key decides about it.

    Args:
        ops: their names.
        cases: patterns of workloads' names, which alone are taken then; empty takes all.

    Raises:
        BadOption: no workload of these ops has such a name.
    """
    chosen = set(ops)
    workloads = sorted((one for one in gpu_workloads() if one.op in chosen), key=importance)
    if cases:
        names = set(some_of("--case", cases, dict.fromkeys(one.name for one in workloads)))
        return [one for one in workloads if one.name in names]
    if "conv_norm_act" not in chosen:
        return [*workloads]
    sides = sorted(RESOLUTIONS, key=lambda side: importance(Workload("encode", CASES[f"px{side}"])))
    return [*dict.fromkeys(shape for side in sides for shape in resnet50_shapes(side)), *workloads]


def run(
    tasks: Sequence[Task],
    dtype: str,
    *,
    minutes: float | None,
    jobs: int,
    out: Path | None,
    record: bool,
    resume: bool = False,
) -> int:
    """Tune and write.

    With ``resume``, keys that were tuned at this commit on this device are known, and tasks that ended not begun again.

    Returns:
        0; 1 if a task broke the device, which a rerun begins again; 75 if a run that resumes did not reach every task;
        130 after Ctrl-C, with what was found written.
    """
    facts = environment.describe("cuda")
    path = out or path_of(facts["device"], record=record)
    ended = Ended.read(path, dtype, facts) if resume else None
    if ended is not None:
        tasks = [task for task in tasks if name_of(task) not in ended.tasks]
    end = None if minutes is None else time.monotonic() + 60 * minutes
    interrupted = over = False
    broken = 0  # tasks
    if jobs > 1 and tasks:
        print_compiled(tasks, dtype, jobs)
    make = partial(Session, dtype)
    known = Tuned() if ended is None else ended.tuned
    worker = Isolated(partial(make, known))
    with Progress(len(tasks)) as progress, closing(worker):
        found = Found(progress, known)
        try:
            for number, task in enumerate(tasks):
                if end is not None and time.monotonic() > end:
                    print(f"the time is over, {len(tasks) - number} of {len(tasks)} tasks were not begun")
                    over = True
                    break
                progress.step(name_of(task))
                whole = run_task(task, worker, make, found)
                broken += not whole
                worker.make = partial(make, found.tuned)  # what a fresh process knows
                if ended is not None and whole:
                    ended.tasks.append(name_of(task))
                write(path, found.tuned, facts, ended)
                progress.done()
        except KeyboardInterrupt:
            interrupted = True
            print("interrupted: what was found is kept")
    tuned = found.tuned
    for failure in found.failures:
        print(f"failed: {failure}")
    print(f"{len(tuned.configurations)} of {len(tuned.seen)} keys have a better configuration; written: {shown(path)}")
    if not record and out is None:
        print(f"launchers read {shown(tuning.FOLDER)}: --record writes there")
    if interrupted:
        return 130
    return 1 if broken else UNFINISHED if over and ended is not None else 0


def name_of(task: Task) -> str:
    """Name a task in the progress and in the file."""
    return str(task) if isinstance(task, convolution.Shape) else f"{task.op} {task.name}"


@dataclass
class Ended:
    """The part of a file by which a tuning goes on.

    Attributes:
        dtype: of the inputs.
        tuned: what was found.
        tasks: names of those that ended.
    """

    dtype: str
    tuned: Tuned = field(default_factory=Tuned)
    tasks: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, dtype: str, facts: dict[str, Any]) -> Ended:
        """Read it from a file of the same commit, device and dtype; empty where there is none."""

        def parse(content: Any) -> Ended:
            ended = content.get("ended", {})
            if ended.get("dtype") != dtype or not is_same_run(content["environment"], facts):
                return cls(dtype)
            seen, backends = dict(ended["seen"]), dict(content["backends"])
            configurations = {name: config for name, config in content["configurations"].items() if name in seen}
            gains = {name: gain for name, gain in content["gains"].items() if name in seen or name in backends}
            return cls(dtype, Tuned(configurations, gains, seen, backends), list(ended["tasks"]))

        return read_earlier(path, parse, cls(dtype))


def run_task(task: Task, worker: Worker, make: Callable[[Tuned], Session], found: Found) -> bool:
    """Run a task, again where one of its keys failed, which then counts as seen; tell whether it came to its end."""
    failure = worker.run(task, found)
    while failure is not None:
        found.failures.append(f"{failure.who or task}: {failure.reason}")
        if not failure.who or failure.who in found.tuned.seen:
            return False
        found.tuned.seen[failure.who] = {}
        worker.make = partial(make, found.tuned)
        failure = worker.run(task, found)
    return True


def path_of(device: str, *, record: bool) -> Path:
    """Return the file of a device: the one that launchers read, or one beside the other results."""
    return tuning.FOLDER / f"{tuning.device_slug(device)}.json" if record else results_folder(device) / FILE


def write(path: Path, tuned: Tuned, facts: dict[str, Any], ended: Ended | None = None) -> None:
    """Write the device's file: what was found now beside what it held of other keys, and how a rerun goes on."""
    if ended is not None:
        before = read_earlier(path, dict, {})
    else:  # a file that launchers read is not written over where it is damaged
        before = read_json(path) if path.exists() else {}
    kept = {name: config for name, config in before.get("configurations", {}).items() if name not in tuned.seen}
    backends = {**before.get("backends", {}), **tuned.backends}
    gains = {name: gain for name, gain in before.get("gains", {}).items() if name in kept or name in backends}
    content = {
        "configurations": dict(sorted({**kept, **tuned.configurations}.items())),
        "backends": dict(sorted(backends.items())),
        "gains": dict(sorted({**gains, **tuned.gains}.items())),
        "environment": facts,
    }
    if ended is not None:
        content["ended"] = {"dtype": ended.dtype, "seen": tuned.seen, "tasks": ended.tasks}
    write_json(path, content)
    tuning.stored.cache_clear()
    tuning.stored_backends.cache_clear()
