"""The command ``tune``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .. import cli
from ..records.devices import DTYPES


def tune(
    op: Annotated[
        list[str] | None, typer.Option("--op", metavar="NAME", help="Tune these ops. By default all.")
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option("--case", metavar="NAME", help="At these workloads alone; may be patterns. By default all."),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="DTYPE", help=f"Dtype of the inputs: {', '.join(DTYPES)}.")
    ] = "bf16",
    minutes: cli.Minutes = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            metavar="N",
            help="Processes that compile what will be tried, before it. By default one a core; 1: none.",
            callback=cli.within(low=1),
        ),
    ] = None,
    resume: cli.Resume = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="File of the results, instead of `out/<device>/tuned.json`.",
            callback=cli.one_place,
        ),
    ] = None,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help="Write to `hia_kernels/core/tuned/<device>.json`, which launchers read.",
            callback=cli.one_place,
        ),
    ] = False,
) -> int:
    """Time configurations of the Triton kernels on this GPU, and backends against each other; keep the fastest.

    What has wrong results is not timed, and a configuration that breaks the device costs its key alone. The file keeps
    what it held of keys that this run does not meet.
    """
    from ..workloads import ops
    from .run import run, tasks_of

    chosen = cli.some_of("--op", op or ["*"], ops())
    dtype, tasks = cli.one_of("--dtype", dtype, DTYPES), tasks_of(chosen, case or ())
    cli.device_of("cuda")
    count = jobs or len(os.sched_getaffinity(0))
    return run(tasks, dtype, minutes=minutes, jobs=count, out=out, record=record, resume=resume)
