"""What ``make gpu`` runs on a machine with a CUDA GPU: build, GPU tests, benchmarks, in minutes, installing nothing.

Every step has a deadline, the most important come first, and what a step has measured is on disk if it is cut
off. Needs torch and the standard library alone: a step whose packages are missing is left out, aloud. It imports
torch late, since that counts too.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import datetime
import difflib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..records.record import Measurement

REPOSITORY = Path(__file__).resolve().parents[2]
TOTAL_S = 540
GRACE_S = 8.0  # between asking a step to stop and ending it
RESERVE_S = 25.0  # to end the last step, and for the tables
NATIVE_SUFFIXES = {".cpp", ".cu"}
TEST_PACKAGES = ("pytest", "transformers", "safetensors", "numpy", "PIL")
HOST_PACKAGES = ("transformers", "safetensors", "numpy", "PIL")
TEST_FOLDERS = ("tests/ops", "tests/hia")
OWN = ("bench", "hia", "hia_kernels", "tests")
TRIAL_TARGETS = ("attention-*-784-forward",)  # what a CPU does in seconds
FURTHEST = 10
SECONDS, MINUTES = "{seconds}", "{minutes}"
MARGIN_S = 15.0  # for a step to start and to finish what it is at


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of the step and its log.
        command: without the interpreter: arguments of Python; "{seconds}" and "{minutes}" become what it may
            take, less a margin.
        at_most_s: its own deadline, seconds.
        needs: packages without which it is left out.
        without: packages it can do without, and what is lost then.
        skip: why it is left out; None if it isn't.
        spare: takes what the others leave, and none of their time.
    """

    name: str
    command: tuple[str, ...]
    at_most_s: float
    needs: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    skip: str | None = None
    spare: bool = False


@dataclass(frozen=True)
class Done:
    """How a step went.

    Attributes:
        name: of the step.
        status: "ok", "failed", "out of time" or "left out".
        detail: exit code, reason, or nothing.
        seconds: it took.
    """

    name: str
    status: str
    detail: str
    seconds: float


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parsed flags.

    Raises:
        SystemExit: a value that isn't allowed.
    """
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only to try the steps")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="records and logs (default: bench/results/<device>; build/gpu of a trial)",
    )
    parser.add_argument("--seconds", type=float, default=TOTAL_S, metavar="S", help=f"for everything ({TOTAL_S})")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps")
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"--seconds: must be positive, got {options.seconds:g}")
    return options


def cuda_devices() -> list[str]:
    """Names of the CUDA devices that torch sees."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def missing(packages: Iterable[str]) -> list[str]:
    """Those that can't be imported here."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def find_nvcc() -> str | None:
    """The CUDA compiler: where torch would look for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    beside = Path(home) / "bin" / "nvcc"
    return shutil.which("nvcc") or (str(beside) if beside.exists() else None)


def native_sources(root: Path = REPOSITORY) -> list[Path]:
    """C++ and CUDA sources of the native extension."""
    return sorted(path for path in (root / "csrc").rglob("*") if path.suffix in NATIVE_SUFFIXES)


def build_skipped(nvcc: str | None, sources: Sequence[Path]) -> str | None:
    """Why there is nothing to build; None if there is."""
    if not sources:
        return "csrc/ holds no .cpp or .cu source"
    if nvcc is None:
        return "no nvcc: neither on PATH nor below CUDA_HOME or /usr/local/cuda"
    return None if importlib.util.find_spec("setuptools") else "setuptools is not installed"


def plan(device: str, devices: Sequence[str], out: Path, build_skip: str | None) -> list[Step]:
    """The steps, in order.

    Args:
        device: "cuda" or "cpu".
        devices: names of the CUDA devices; only their number and existence matter.
        out: folder of the records.
        build_skip: why the extension is not built.

    Raises:
        RuntimeError: "cuda" and no device.
    """
    if device == "cuda" and not devices:
        raise RuntimeError(
            "bench.gpu.run: --device cuda needs a CUDA device that torch can see, got none; "
            "--device cpu tries the steps without one"
        )
    where = ("--device", device, "--out", str(out))
    tests = (
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu and not slow",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        *TEST_FOLDERS,
        *(f"--ignore={name}" for name in unimportable_tests()),
    )
    targets = ("-m", "bench", "targets", *where, "--add")
    kernels = ("-m", "bench", "ops", *where, "--minutes", MINUTES)
    end_to_end = ("-m", "bench", "end-to-end", *where, "--deadline", SECONDS, "--batch", "1", "--resolutions")
    table3 = (
        "-m",
        "bench",
        "table3",
        *where,
        "--methods",
        "baseline",
        "hia",
        "--resolutions",
        "448",
        "896",
        "--attention",
        "sdpa",
    )
    if device == "cpu":
        targets += ("--quick", "--only", *TRIAL_TARGETS)
        kernels += ("--quick",)
        end_to_end += ("448", "--repeats", "2", "--budget", "1")
    else:
        end_to_end += ("896", "--repeats", "3")
    measuring = (*HOST_PACKAGES, "rich")
    return [
        Step("info", ("-m", "hia_kernels.info"), 40),
        Step("build", ("setup.py", "build_ext", "--inplace"), 120, skip=build_skip),
        Step("tests", tests, 100, needs=TEST_PACKAGES, without=("hypothesis",)),
        Step("targets", (*targets, "--no-compile", "--minutes", MINUTES), 160, needs=measuring),
        Step("kernels", kernels, 120, needs=measuring),
        Step("end_to_end", end_to_end, 100, needs=HOST_PACKAGES),
        Step("table3", table3, 70, needs=measuring, without=("matplotlib",)),
        Step(
            "compiled",
            (*targets, "--compiled", "--compile-minutes", "1", "--minutes", MINUTES),
            300,
            needs=measuring,
            skip=None if device == "cuda" else "a trial compiles nothing",
            spare=True,
        ),
    ]


def unimportable_tests(root: Path = REPOSITORY, lacking: Callable[[Iterable[str]], list[str]] = missing) -> list[str]:
    """Test files that import a package that isn't here, by themselves or through another file of the tests."""
    found = []
    for folder in TEST_FOLDERS:
        for path in sorted((root / folder).glob("test_*.py")):
            packages = sorted(_packages(path, root, set()) - {*OWN, *sys.stdlib_module_names})
            if lacking(packages):
                found.append(path.relative_to(root).as_posix())
    return found


def _packages(path: Path, root: Path, seen: set[Path]) -> set[str]:
    """What a file of the tests imports on import."""
    seen.add(path)
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(root).parts[: -node.level] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            names.update((base, *(f"{base}.{alias.name}" for alias in node.names)))
    found = {name.partition(".")[0] for name in names}
    for name in names:
        other = root.joinpath(*name.split(".")).with_suffix(".py")
        if name.startswith("tests.") and other.exists() and other not in seen:
            found |= _packages(other, root, seen)
    return found


def share(steps: Sequence[Step], number: int, left: float) -> float:
    """Seconds a step may take: its own deadline, or its part of what is left where not all of them fit."""
    step = steps[number]
    if step.spare:
        return min(step.at_most_s, left)
    wanted = sum(one.at_most_s for one in steps[number:] if one.skip is None and not one.spare)
    return step.at_most_s * min(1.0, left / wanted)


def run_step(step: Step, seconds: float, log: Path, environment: dict[str, str]) -> Done:
    """Run it; where the device fails in one of its tasks, which no process survives, go on in a fresh one."""
    started = time.monotonic()
    log.write_bytes(b"")
    point, resumed = None, 0
    while True:
        left = seconds - (time.monotonic() - started)
        code = run_once(step, left, log, environment, ("--resume", point) if point else ())
        before, point = point, resume_point(log)
        left = seconds - (time.monotonic() - started)
        if code != 1 or point in (None, before) or left < 2 * MARGIN_S:
            break
        resumed += 1
    taken = time.monotonic() - started
    again = f"the device failed, and {resumed} fresh processes went on" if resumed else ""
    failed = failed_tests(log) if "pytest" in step.command else 0
    if code is None and failed:
        return Done(step.name, "failed", f"{failed} tests had failed when it was stopped after {seconds:.0f} s", taken)
    if code is None and not resumed:
        return Done(step.name, "out of time", f"stopped after {seconds:.0f} s; what it had measured is written", taken)
    status = "ok" if code == 0 and not resumed else "failed"
    ended = f"stopped after {seconds:.0f} s" if code is None else f"exit code {code}" if code else ""
    return Done(step.name, status, "; ".join(filter(None, (ended, again))), taken)


def resume_point(log: Path) -> str | None:
    """Where the last process says that a fresh one could go on."""
    found = re.findall(r"the same command with --resume (\d+:\S*) goes on", log.read_text("utf-8", errors="replace"))
    return found[-1] if found else None


def run_once(step: Step, seconds: float, log: Path, environment: dict[str, str], more: Sequence[str]) -> int | None:
    """One process in a group of its own; at its deadline ask it to stop, as Ctrl-C does, and then end it.

    Returns:
        Its exit code; None if it had to be stopped.
    """
    own = max(1, round(seconds - MARGIN_S))
    known = {SECONDS: str(own), MINUTES: f"{own / 60:.2f}"}
    command = [known.get(part, part) for part in step.command] + list(more)
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=REPOSITORY,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=interruptible,
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            stop(process)


def failed_tests(log: Path) -> int:
    """Tests that had failed, by pytest's last line or, where it was ended before that, by its lines of letters."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        if re.search(r" in \d+\.\d+s\b", line):
            return sum(int(number) for number in re.findall(r"(\d+) (?:failed|error)", line))
    letters = [line for line in lines if re.fullmatch(r"[.FEsxX]+(\s+\[\s*\d+%\])?", line.strip())]
    return sum(line.count("F") + line.count("E") for line in letters)


def interruptible() -> None:
    """Undo what nohup and a shell's ``&`` do to their children, or a step couldn't be asked to stop."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the group and wait a little, then kill it."""
    for sign, wait in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            break
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=wait)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    # children of a step that ended by itself
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def child_environment(out: Path) -> dict[str, str]:
    """This one's, with the checkout's sources first and no file written beside them but the extension."""
    paths = [str(REPOSITORY), str(REPOSITORY / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def tail(log: Path, lines: int = 12) -> str:
    """The end of a log, indented."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join("    " + line[:200] for line in text[-lines:])


def run_all(
    steps: Sequence[Step],
    out: Path,
    seconds: float,
    results: list[Done],
    *,
    lacking: Callable[[Iterable[str]], list[str]] = missing,
) -> None:
    """Run the steps one after the other, and keep ``gpu.json`` up to date.

    Args:
        steps: of :func:`plan`.
        out: folder of logs and records.
        seconds: for all of them.
        results: how each went is added.
        lacking: which of some packages are missing.
    """
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    end, environment = time.monotonic() + seconds, child_environment(out)
    absent = {step.name: lacking(step.needs) for step in steps}
    steps = [
        dataclasses.replace(step, skip=f"not installed here: {', '.join(absent[step.name])}")
        if step.skip is None and absent[step.name]
        else step
        for step in steps
    ]
    for number, step in enumerate(steps):
        lost = [] if step.skip else lacking(step.without)
        if lost:
            print(f"{step.name}: goes on without {', '.join(lost)}", flush=True)
        left = end - time.monotonic() - RESERVE_S
        if step.skip is not None:
            done = Done(step.name, "left out", step.skip, 0.0)
        elif left < 5:
            done = Done(step.name, "left out", f"no time left of {seconds:.0f} s", 0.0)
        else:
            allowed = share(steps, number, left)
            print(f"{step.name}: python {' '.join(step.command)} (at most {allowed:.0f} s)", flush=True)
            done = run_step(step, allowed, logs / f"{step.name}.log", environment)
            if done.status != "ok" or step.name in ("info", "tests"):
                print(tail(logs / f"{step.name}.log"), flush=True)
        print(
            f"{step.name}: {done.status}{', ' + done.detail if done.detail else ''} ({done.seconds:.0f} s)", flush=True
        )
        results.append(done)
        (out / "gpu.json").write_text(json.dumps([dataclasses.asdict(one) for one in results], indent=1) + "\n")


def fresh_records(path: Path, since: datetime.datetime | None) -> list[Measurement]:
    """A file's records that were made since then; all of them where no time is named.

    Raises:
        ValueError: it holds something else.
        OSError: unreadable.
    """
    from ..records.record import read_records

    found = read_records(path) if path.exists() else []
    if since is None:
        return found
    dates = [datetime.datetime.fromisoformat(record.environment["date"]) for record in found]
    return [record for record, date in zip(found, dates, strict=True) if date >= since.replace(microsecond=0)]


def furthest_table(out: Path, since: datetime.datetime | None = None) -> list[str]:
    """The ten rows of ours furthest from their roofline, from whatever records of this run there are."""
    from ..report.data import sources
    from ..report.speedup import furthest_from_roofline

    records, problems = [], []
    for name in ("kernels.json", "end_to_end.json"):
        try:
            records += fresh_records(out / name, since)
        except (ValueError, OSError, KeyError) as error:
            problems.append(f"{out / name} can't be read: {error}")
    rows = furthest_from_roofline(records, FURTHEST)
    if not rows:
        return [*problems, "furthest from their roofline: nothing was measured that has a roofline"]
    lines = [
        f"the {len(rows)} rows of ours furthest from their roofline",
        f"{'% of roofline':>10} {'p50 ms':>10} {'roofline ms':>10}  {'op':<20} {'mode':<9} {'dtype':<5} case",
    ]
    for row in rows:
        lines.append(
            f"{row.percent_of_roofline:10.1f} {row.p50_ms:10.4f} {row.roofline_ms or 0:10.4f}  {row.op:<20} "
            f"{row.mode:<9} {row.dtype:<5} {row.case}" + ("  noisy" if row.noisy else "")
        )
    return [*problems, *lines, *sources(rows)]


def verdict_table(out: Path, device: str, since: datetime.datetime | None = None) -> list[str]:
    """Every target that the project is held to, judged by this run's records alone."""
    path = out / "targets.json"
    try:
        records = fresh_records(path, since)
    except (ValueError, OSError, KeyError) as error:
        return [f"{path} can't be read: {error}"]
    if not records:
        return ["targets: none was measured"]
    from ..records.targets import TARGETS, judge
    from ..report.data import sources

    stored = {one["name"]: one for one in json.loads(path.read_text(encoding="utf-8")).get("targets", [])}
    known = {name: one for name, one in stored.items() if one["kind"] == "flops"}  # by formula: they need no record
    found = [known[one.name] if one.name in known else judge(one, records, device).to_dict() for one in TARGETS]
    lines = ["the targets", f"{'verdict':<12} {'measured':>8} {'target':>8}  {'name':<36} note"]
    for one in found:
        measured, target = (f"{one[name]:.2f}" if one[name] is not None else "-" for name in ("ratio", "target"))
        lines.append(f"{one['verdict']:<12} {measured:>8} {target:>8}  {one['name']:<36} {one['note']}")
    verdicts = [one["verdict"] for one in found]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in dict.fromkeys(verdicts))
    return [*lines, counts, *sources(records)]


def summary(results: Sequence[Done]) -> list[str]:
    """A line a step."""
    return [f"{done.name:<11} {done.status:<12} {done.seconds:5.0f} s  {done.detail}".rstrip() for done in results]


def main(arguments: list[str] | None = None, devices: Sequence[str] | None = None) -> int:
    """Run the steps.

    Args:
        arguments: of the command line.
        devices: names of CUDA devices, for a try without any; None asks torch.

    Returns:
        0; 1 if a step failed; 2 if there is no device or no such step; 130 after Ctrl-C. A step out of time is no
        failure, unless tests had failed in it.
    """
    started, since = time.monotonic(), datetime.datetime.now(datetime.timezone.utc)
    options = parse(arguments)
    from ..records.environment import cpu_name, slug

    found = cuda_devices() if devices is None and options.device == "cuda" else list(devices or ())
    name = found[0] if found else cpu_name()
    folder = REPOSITORY / "bench" / "results" / slug(name) if options.device == "cuda" else REPOSITORY / "build" / "gpu"
    out = (options.out or folder).resolve()
    try:
        steps = chosen(plan(options.device, found, out, build_skipped(find_nvcc(), native_sources())), options.only)
    except (RuntimeError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if options.list:
        for step in steps:
            print(f"{step.name:<11} at most {step.at_most_s:4.0f} s  {step.skip or 'python ' + ' '.join(step.command)}")
        return 0
    print(f"{name}; records and logs in {out}; at most {options.seconds:.0f} s", flush=True)
    results: list[Done] = []
    try:
        run_all(steps, out, options.seconds - (time.monotonic() - started), results)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    tables = [summary(results), verdict_table(out, options.device, since), furthest_table(out, since)]
    print("\n".join(line for table in tables for line in ("", *table)), flush=True)
    if interrupted:
        print("interrupted: what was measured is kept", flush=True)
        return 130
    return 1 if any(done.status == "failed" for done in results) else 0


def chosen(steps: Sequence[Step], only: Sequence[str] | None) -> list[Step]:
    """Those asked for.

    Raises:
        ValueError: there is no such step; the nearest are offered.
    """
    names = [step.name for step in steps]
    for wanted in only or ():
        if wanted not in names:
            near = difflib.get_close_matches(wanted, names, n=2, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"--only: must be among {', '.join(names)}, got {wanted!r}{hint}")
    return [step for step in steps if not only or step.name in only]


if __name__ == "__main__":
    sys.exit(main())
