"""The command ``smoke``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .. import cli


def smoke(
    device: cli.Device = "auto",
    op: Annotated[
        list[str] | None, typer.Option("--op", metavar="NAME", help="The kernels of these ops. By default all.")
    ] = None,
    minutes: cli.Minutes = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            metavar="N",
            help="Processes that compile the kernels first. By default one a core; 1: none.",
            callback=cli.within(low=1),
        ),
    ] = None,
    resume: cli.Resume = False,
    out: cli.Out = None,
    record: cli.Record = False,
) -> int:
    """Launch every Triton kernel, forward and backward, at a small and a real shape, and check what it computes.

    Against the reference in higher precision, by the tests' tolerance, on poisoned memory, twice with the same bits. A
    kernel that no case launches has failed, too. On a CPU the kernels run in Triton's interpreter, at small shapes
    alone. The exit code is 1 if a kernel failed.
    """
    device = cli.device_of(device)
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
    from ..workloads import ops
    from .run import run

    chosen = cli.some_of("--op", op or ["*"], ops())
    count = jobs or len(os.sched_getaffinity(0))
    return run(device, chosen, minutes=minutes, jobs=count, out=out, record=record, resume=resume)
