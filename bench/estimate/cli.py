"""The command ``estimate``."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from typing import Annotated

import typer

from .. import cli

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
    changed = (bandwidth, tflops) != (None, None)
    if write and (op or case or device or changed or launch_us != LAUNCH_US):
        raise cli.BadOption("--write: must cover everything as it is; leave all options but --jobs out")
    from hia_kernels.core import triton_support

    from .collect import known
    from .measured import measured
    from .model import DEVICES

    names = cli.some_of("--device", device or ["*"], DEVICES)
    if changed and len(names) > 1:
        raise cli.BadOption("--bandwidth, --tflops: must be of one device, got two; add --device h100 or h200")
    if importlib.util.find_spec("triton") is None:
        raise cli.BadOption("the package triton must be installed, got none")
    if triton_support.interpreted():
        raise cli.BadOption("TRITON_INTERPRET must not be set, got 1")
    devices = {}
    for name in names:
        found, records = DEVICES[name], measured(DEVICES[name].folder)
        if changed:
            given = {"bandwidth": (bandwidth or found.bandwidth / 1e12) * 1e12, "source": "as the options say"}
            found = replace(found, **given, rate=(tflops or found.rate / 1e12) * 1e12)
        devices[found] = records
    everything = known((key[0], key[1]) for records in devices.values() for key in records)
    chosen = set(cli.some_of("--op", op or ["*"], dict.fromkeys(one.op for one in everything)))
    some = [one for one in everything if one.op in chosen]
    cases = set(cli.some_of("--case", case or ["*"], dict.fromkeys(one.name for one in some)))
    from .run import run

    count = jobs or len(os.sched_getaffinity(0))
    some = [one for one in some if one.name in cases]
    return run(some, devices, launch_s=launch_us / 1e6, jobs=count, write=write)
