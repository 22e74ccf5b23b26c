"""The command ``targets``."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import cli


def targets(
    device: cli.Device = "auto",
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="These targets, or patterns of names.")
    ] = None,
    no_compile: Annotated[
        bool, typer.Option("--no-compile", help="Leave out the providers that use torch.compile.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Run only the workloads that have a provider with torch.compile.")
    ] = False,
    compile_minutes: Annotated[
        float | None,
        typer.Option(
            "--compile-minutes",
            metavar="M",
            help="Time limit for a compiled provider's first result: by default 15, on CUDA 12.",
            callback=cli.within(above=0),
        ),
    ] = None,
    minutes: cli.Minutes = None,
    out: cli.Out = None,
    add: Annotated[bool, typer.Option("--add", help="Keep what the file holds and this run has no row for.")] = False,
    resume: cli.Resume = False,
    record: cli.Record = False,
    listing: cli.Listing = False,
    quick: cli.Quick = False,
) -> int:
    """Measure and judge the ratios that this project is held to.

    A missed target is a result, not an error: the exit code is 1 only if something failed, and 130 after Ctrl-C.
    The least important workloads come last, should `--minutes` be over before them.
    """
    if no_compile and compiled:
        raise cli.BadOption("--compiled: must not be given with --no-compile, got both")
    import sys

    from ..progress import console_for
    from . import run

    choice = run.choose(
        device,
        only or [],
        listing=listing,
        compile=not no_compile,
        compiled_only=compiled,
        compile_minutes=compile_minutes,
        minutes=minutes,
        quick=quick,
    )
    if listing:
        run.print_list(choice.targets, console_for(sys.stdout))
        return 0
    return run.run(choice, out=out, record=record, add=add, resume=resume)
