"""The command ``estimate``."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from .. import cli

if TYPE_CHECKING:
    from .page import Devices

LAUNCH_US = 2.5


def estimate(
    op: Annotated[
        list[str] | None, typer.Option("--op", metavar="NAME", help="Ops and composites. By default all.")
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option("--case", metavar="NAME", help="Their cases, such as `13b-*`. By default all.")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option("--device", metavar="DEVICE", help="h100, h200. By default both.")
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option("--bandwidth", metavar="TB_PER_S", help="Of the one device named.", callback=cli.within(above=0)),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option("--tflops", metavar="N", help="In bf16, of the one device named.", callback=cli.within(above=0)),
    ] = None,
    launch_us: Annotated[
        float,
        typer.Option("--launch-us", metavar="US", help="Of every kernel, on the device.", callback=cli.within(low=0)),
    ] = LAUNCH_US,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", metavar="N", help="Processes that compile. By default one a core.", callback=cli.within(low=1)
        ),
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Replace `docs/estimates.md`; everything, unchanged.")] = False,
) -> int:
    """Print each workload's roofline, its estimate from the compiled kernels, and what was measured of it.

    Needs Triton and no GPU. The page states the formula. An H100's ceilings are measured, an H200's expected.
    """
    if write and (op or case or device or bandwidth or tflops or launch_us != LAUNCH_US):
        raise cli.BadOption("--write: must cover everything as it is; leave all options but --jobs out")
    from hia_kernels.core import triton_support

    from .collect import known

    devices = _devices(device, bandwidth, tflops)
    if importlib.util.find_spec("triton") is None:
        raise cli.BadOption("the package triton must be installed, got none")
    if triton_support.interpreted():
        raise cli.BadOption("TRITON_INTERPRET must not be set, got 1")
    everything = known((key[0], key[1]) for records in devices.values() for key in records)
    chosen = set(cli.some_of("--op", op or ["*"], dict.fromkeys(one.op for one in everything)))
    some = [one for one in everything if one.op in chosen]
    cases = set(cli.some_of("--case", case or ["*"], dict.fromkeys(one.name for one in some)))
    from .run import run

    count = jobs or len(os.sched_getaffinity(0))
    some = [one for one in some if one.name in cases]
    return run(some, devices, launch_s=launch_us / 1e6, jobs=count, write=write)


def _devices(given: list[str] | None, bandwidth: float | None, tflops: float | None) -> Devices:
    """Return the ceilings of the devices named, as the options change them, and what was measured on each.

    Raises:
        BadOption: an unknown name, or ceilings of two devices at once.
    """
    from .measured import measured
    from .model import DEVICES

    found = [DEVICES[name] for name in cli.some_of("--device", given or ["*"], DEVICES)]
    if bandwidth or tflops:
        if len(found) > 1:
            raise cli.BadOption("--bandwidth, --tflops: must be of one device, got two; add --device h100 or h200")
        (one,) = found
        rate = one.rate if tflops is None else tflops * 1e12
        moved = one.bandwidth if bandwidth is None else bandwidth * 1e12
        found = [replace(one, bandwidth=moved, rate=rate, source="as the options say")]
    return {one: measured(one.folder) for one in found}
