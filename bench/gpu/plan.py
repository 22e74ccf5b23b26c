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
TOTAL_S = 540.0  # what the command takes unless it is told otherwise
TRIAL_TARGETS = ("attention-*-784-forward",)  # what a CPU does in seconds


def plan(
    device: str, devices: Sequence[str], out: Path, build_skip: str | None, target: str | None = None
) -> list[Step]:
    """List the steps.

    Args:
        device: "cuda" or "cpu".
        devices: names of the CUDA devices; only their number and existence matter.
        out: folder of the records.
        build_skip: why the extension is not built.
        target: of :data:`bench.launches.device.TARGETS`, what the device is; None where it is none of them.

    Raises:
        BadOption: "cuda" and no device.
    """
    if device == "cuda" and not devices:
        raise BadOption(
            "--device: cuda needs a CUDA device that torch can see, got none; --device cpu tries the steps without one"
        )
    where = ("--device", device, "--out", str(out))
    targets = ("-m", "bench", "targets", *where, "--add")
    ops = ("-m", "bench", "ops", *where, "--minutes", MINUTES)
    end_to_end = ("-m", "bench", "end-to-end", *where, "--deadline", SECONDS, "--batch", "1", "--resolutions")
    methods = ("--methods", "baseline", "hia", "--resolutions", "448", "896", "--attention", "sdpa")
    table3 = ("-m", "bench", "table3", *where, *methods)
    if device == "cpu":
        targets += ("--quick", "--only", *TRIAL_TARGETS)
        ops += ("--quick",)
        end_to_end += ("448", "--repeats", "2", "--budget", "1")
    else:
        end_to_end += ("896", "--repeats", "3")
    compiled = ("--compiled", "--compile-minutes", "1", "--minutes", MINUTES)
    tune = ("-m", "bench", "tune", "--out", str(out / "tuned.json"), "--minutes", MINUTES)
    launches = ("-m", "bench", "launches", "--target", target or "sm_90", "--fresh", "--cache", str(out / "launches"))
    trial = None if device == "cuda" else "a trial compiles nothing"
    unknown = None if target else "launches are recorded for no GPU of this kind"
    return [
        Step("info", ("-m", "hia_kernels.info"), 20),
        Step("compile", launches, 60, needs=("triton", *MEASURING), skip=trial or unknown),
        Step("tests", _pytest(device), 150, needs=TEST_PACKAGES, without=("hypothesis", "xdist")),
        Step("targets", (*targets, "--no-compile", "--minutes", MINUTES), 120, needs=MEASURING),
        Step("end-to-end", end_to_end, 75, needs=MEASURING),
        Step("table3", table3, 70, needs=MEASURING, without=("matplotlib",)),
        Step("ops", ops, 120, needs=MEASURING, spare=device == "cuda"),
        Step("tune", tune, 180, needs=MEASURING, skip=trial, spare=True),
        Step("compiled", (*targets, *compiled), 300, needs=MEASURING, skip=trial, spare=True),
        Step("build", ("setup.py", "build_ext", "--inplace"), 120, skip=build_skip, spare=True),
    ]


def _pytest(device: str) -> tuple[str, ...]:
    """Return the command of the GPU's tests; an absent package in one file must not fail the collection of all."""
    spread = () if device == "cpu" or missing(("xdist",)) else ("-n", "auto", "--dist", "worksteal")
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
        *spread,
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
