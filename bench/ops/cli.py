"""The command ``ops``."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import cli

Names = list[str] | None


def ops(
    op: Annotated[
        Names, typer.Option("--op", metavar="NAME", help="Ops and composites by name, or `ops`, or `composites`.")
    ] = None,
    case: Annotated[
        Names,
        typer.Option("--case", metavar="NAME", help="Shapes of bench/workloads, or `all`. By default the device's."),
    ] = None,
    set_name: Annotated[
        str | None,
        typer.Option(
            "--set",
            metavar="NAME",
            help="cpu, gpu or quick: what a run without `--case` takes there; targets: what `targets` compares.",
        ),
    ] = None,
    provider: Annotated[
        Names, typer.Option("--provider", metavar="NAME", help="Who is measured. By default all.")
    ] = None,
    dtype: cli.Dtypes = None,
    mode: Annotated[
        Names, typer.Option("--mode", metavar="MODE", help="forward, backward, both, dispatch. By default all.")
    ] = None,
    device: cli.Device = "auto",
    quick: cli.Quick = False,
    minutes: cli.Minutes = None,
    resume: cli.Resume = False,
    listing: cli.Listing = False,
    json: cli.Json = None,
    out: cli.Out = None,
    record: cli.Record = False,
) -> int:
    """Time every op and composite beside every peer and the device's limits.

    A provider is timed only after its results passed the tests' tolerance. Names may be patterns such as `13b-*`,
    repeated, or separated by commas or spaces; `--list` prints them. The exit code is 1 if one of ours failed, and 130
    after Ctrl-C. A file of results keeps what this run has no row for, until a run of everything has ended.
    """
    import sys

    from ..progress import console_for
    from .output import print_list
    from .plan import Request, make_plan
    from .run import run

    lists = {"op": op, "case": case, "provider": provider, "mode": mode, "dtype": dtype}
    given = {name: values or () for name, values in lists.items()}
    plan = make_plan(Request(set=set_name, device=device, quick=quick, **given), listing=listing)
    if listing:
        print_list(plan, console_for(sys.stdout))
        return 0
    return run(plan, minutes=minutes, out=out, record=record, json=json, resume=resume)
