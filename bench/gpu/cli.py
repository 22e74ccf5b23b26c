"""The command ``gpu``."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import cli


def gpu(
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="cuda; cpu only to try the steps.")
    ] = "cuda",
    out: cli.Out = None,
    record: cli.Record = False,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", help="For everything.", callback=cli.within(above=0))
    ] = 540,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="STEP", help="These steps.")] = None,
    listing: cli.Listing = False,
) -> int:
    """Build, run the GPU's tests and every benchmark in nine minutes, on a machine with a CUDA GPU.

    Nothing is installed. Every step has a deadline, and what it has measured is on disk if it is cut off. Ends with the
    verdicts on the targets and the rows furthest from their roofline. The exit code is 1 if a step failed.
    """
    from ..records.devices import DEVICES
    from .run import run

    device = cli.one_of("--device", device, DEVICES)
    if record and device == "cpu":
        raise cli.BadOption("--record: must not be given with --device cpu, which only tries the steps")
    return run(device, out=out, record=record, seconds=seconds, only=only or (), listing=listing)
