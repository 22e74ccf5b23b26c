"""The command ``gpu``."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import cli
from .plan import TOTAL_S


def gpu(
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="cuda; cpu only to try the steps.")
    ] = "cuda",
    out: cli.Out = None,
    record: cli.Record = False,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", help="For everything.", callback=cli.within(above=0))
    ] = TOTAL_S,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="STEP", help="These steps.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what was done at this commit before.")] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Walk every step's Python on a fake GPU, to its kernels' launches.")
    ] = False,
    target: Annotated[
        str, typer.Option("--target", metavar="TARGET", help="The GPU that `--rehearse` pretends.")
    ] = "sm_90",
    listing: cli.Listing = False,
) -> int:
    """Check every kernel, measure, tune and run the GPU's tests on a machine with a CUDA GPU, nine minutes at a time.

    Nothing is installed. The most important steps come first; every step has a deadline, what it has done is on disk if
    it is cut off, and the same command goes on there. Ends with the verdicts on the targets and the rows furthest from
    their roofline. The exit code is 1 if a step failed or something is left to do.
    """
    from ..records.devices import DEVICES

    if rehearse:
        from ..launches.device import TARGETS
        from .rehearsal import run as run_rehearsal

        given = {"--device": device != "cuda", "--fresh": fresh, "--record": record, "--seconds": seconds != TOTAL_S}
        for option in (name for name, is_given in given.items() if is_given):
            raise cli.BadOption(f"{option}: must not be given with --rehearse, which has no device and no deadline")
        target = cli.one_of("--target", target, TARGETS)
        return run_rehearsal(target, only=only or (), out=out, listing=listing)
    from .run import run

    device = cli.one_of("--device", device, DEVICES)
    if record and device == "cpu":
        raise cli.BadOption("--record: must not be given with --device cpu, which only tries the steps")
    return run(device, out=out, record=record, seconds=seconds, only=only or (), listing=listing, fresh=fresh)
