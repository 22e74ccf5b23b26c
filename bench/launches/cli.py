"""The command ``launches``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from .. import cli


def launches(
    target: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="TARGET", help="GPUs to record for, such as sm_90. By default all."),
    ] = None,
    op: Annotated[
        list[str] | None, typer.Option("--op", metavar="NAME", help="Ops and composites to record. By default all.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", metavar="N", help="Processes that compile. By default one a core.", callback=cli.within(low=1)
        ),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="Where results are kept. By default `build/launches`.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compile what results are kept for, too.")] = False,
    tuned: Annotated[
        bool, typer.Option("--tuned", help="Record with the configurations that were measured on such a device.")
    ] = False,
    listing: Annotated[bool, typer.Option("--list", help="Print the recorded launches, and compile none.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Replace `docs/compiled.md`; every op and target.")] = False,
) -> int:
    """Record what the Triton kernels launch on GPUs that aren't there, compile it, and print what breaks their limits.

    On a machine with such a GPU the compiled kernels are found in Triton's cache when they are launched:
    `python -m bench launches --target sm_90 --jobs 16 --fresh` compiles ahead. The exit code is 1 if something breaks a
    limit.
    """
    if write and (op or target or tuned):
        raise cli.BadOption("--write: must cover every op and target, untuned; leave --op, --target and --tuned out")
    from hia_kernels.core import triton_support

    from ..workloads import composites, ops
    from .compile import FOLDER
    from .device import TARGETS
    from .run import print_launches, record_each, run

    chosen = cli.some_of("--op", op, (*ops(), *composites())) if op else ()
    targets = cli.some_of("--target", target or ["*"], TARGETS)
    if importlib.util.find_spec("triton") is None:
        raise cli.BadOption("the package triton must be installed, got none")
    if triton_support.interpreted():
        raise cli.BadOption("TRITON_INTERPRET must not be set, got 1")
    recordings = record_each(targets, chosen, tuned=tuned)
    if listing:
        print_launches(recordings)
        return 0
    count = jobs or len(os.sched_getaffinity(0))
    return run(recordings, jobs=count, cache=cache or FOLDER, fresh=fresh, write=write)
