"""The steps of ``make gpu``, in order: the most important come first, each with its own deadline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..cli import BadOption, some_of
from .available import TEST_FOLDERS, missing, unimportable_tests
from .steps import MINUTES, SECONDS, Step

TEST_PACKAGES = ("pytest", "transformers", "safetensors", "numpy", "PIL")
HOST_PACKAGES = ("transformers", "safetensors", "numpy", "PIL")
MEASURING = (*HOST_PACKAGES, "rich", "typer")
KERNELS = ("triton", *MEASURING)
TOTAL_S = 540.0  # what the command takes unless it is told otherwise
TRIAL_TARGETS = ("attention-*-784-forward",)  # what a CPU does in seconds
TRIAL_SMOKE = ("row_softmax", "inject_rows")  # what Triton's interpreter does in seconds
PASSED = "tests_passed.txt"  # node ids of tests that a rerun leaves out
FURTHEST = "3"  # rows that are profiled


def plan(
    device: str,
    devices: Sequence[str],
    out: Path,
    build_skip: str | None,
    target: str | None = None,
    *,
    fresh: bool = False,
) -> list[Step]:
    """List the steps.

    Args:
        device: "cuda" or "cpu".
        devices: names of the CUDA devices; only their number and existence matter.
        out: folder of the records.
        build_skip: why the extension is not built.
        target: of :data:`bench.launches.device.TARGETS`, what the device is; None where it is none of them.
        fresh: steps measure anew what the folder holds of this commit.

    Raises:
        BadOption: "cuda" and no device.
    """
    if device == "cuda" and not devices:
        raise BadOption(
            "--device: cuda needs a CUDA device that torch can see, got none; --device cpu tries the steps without one"
        )
    resume = () if fresh else ("--resume",)
    where = ("--device", device, "--out", str(out))
    targets = ("-m", "bench", "targets", *where, "--add", *resume)
    ops = ("-m", "bench", "ops", *where, *resume, "--minutes", MINUTES)
    smoke = ("-m", "bench", "smoke", *where, *resume, "--minutes", MINUTES)
    end_to_end = ("-m", "bench", "end-to-end", *where, *resume, "--deadline", SECONDS, "--batch", "1", "--resolutions")
    methods = ("--methods", "baseline", "hia", "--resolutions", "448", "896", "--attention", "sdpa")
    table3 = ("-m", "bench", "table3", *where, *resume, *methods)
    profile = ("-m", "bench", "profile", "--furthest", FURTHEST, *where)
    if device == "cpu":
        targets += ("--quick", "--only", *TRIAL_TARGETS)
        ops += ("--quick",)
        smoke += ("--op", *TRIAL_SMOKE)
        end_to_end += ("448", "--repeats", "2", "--budget", "1")
    else:
        end_to_end += ("896", "--repeats", "3")
    compiled = ("--compiled", "--compile-minutes", "1", "--minutes", MINUTES)
    tune = ("-m", "bench", "tune", "--out", str(out / "tuned.json"), *resume, "--minutes", MINUTES)
    launches = ("-m", "bench", "launches", "--target", target or "sm_90", "--fresh", "--cache", str(out / "launches"))
    trial = None if device == "cuda" else "a trial compiles nothing"
    unknown = None if target else "launches are recorded for no GPU of this kind"
    return [
        Step("info", ("-m", "hia_kernels.info"), 20, again=True),
        Step("compile", launches, 60, needs=KERNELS, skip=trial or unknown, again=True),
        Step("smoke", smoke, 120, needs=KERNELS),
        Step("targets", (*targets, "--no-compile", "--minutes", MINUTES), 120, needs=MEASURING),
        Step("profile", profile, 60, needs=MEASURING),
        Step("tune", tune, 120, needs=MEASURING, skip=trial),
        Step("tests", pytest_command(device, out), 150, needs=TEST_PACKAGES, without=("hypothesis", "xdist")),
        Step("table3", table3, 90, needs=MEASURING, without=("matplotlib",)),
        Step("end-to-end", end_to_end, 90, needs=MEASURING),
        Step("ops", ops, 180, needs=MEASURING),
        Step("compiled", (*targets, *compiled), 300, needs=MEASURING, skip=trial),
        Step("build", ("setup.py", "build_ext", "--inplace"), 120, skip=build_skip),
    ]


def pytest_command(device: str, out: Path) -> tuple[str, ...]:
    """Return the command of the GPU's tests; an absent package in one file must not fail the collection of all.

    A trial on a CPU only collects them.
    """
    spread = () if missing(("xdist",)) else ("-n", "auto", "--dist", "worksteal")
    return (
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu and not slow",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.device_guard",
        "-p",
        "tests.going_on",
        "--passed",
        str(out / PASSED),
        *(("--collect-only",) if device == "cpu" else spread),
        "--continue-on-collection-errors",
        *TEST_FOLDERS,
        *(f"--ignore={name}" for name in unimportable_tests()),
    )


def chosen(steps: Sequence[Step], only: Sequence[str]) -> list[Step]:
    """Return those asked for.

    Raises:
        BadOption: there is no such step.
    """
    names = [step.name for step in steps]
    wanted = some_of("--only", only, names) if only else names
    return [step for step in steps if step.name in wanted]
