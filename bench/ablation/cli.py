"""The commands ``ablation`` and ``ablation-detail``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import cli
from ..records.environment import REPOSITORY

CACHE = REPOSITORY / "build" / "ablation"


def ablation(
    rows: Annotated[
        list[str] | None,
        typer.Option(
            "--rows", metavar="ROW", help="Train these rows of the tables. By default all; a wrong name lists them."
        ),
    ] = None,
    start: Annotated[
        bool,
        typer.Option(
            "--start", help="Train the rows of docs/learning.md's start instead: one part of it left out in each."
        ),
    ] = False,
    seeds: Annotated[
        list[int] | None, typer.Option("--seeds", metavar="N", help="Seeds, instead of the protocol's.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="The full model and the one without high resolution, one seed, by a smaller protocol: five minutes. "
            "Fails unless the full one tells presence and the other doesn't.",
        ),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", metavar="N", help="Runs side by side. By default one a core.", callback=cli.within(1)),
    ] = None,
    cache: Annotated[
        Path, typer.Option("--cache", metavar="DIR", help="Folder of host, encoder and phantoms.")
    ] = CACHE,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of runs, tables and plot, instead of one in out/ by protocol."
        ),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write the tables to bench/results as well, which is committed.")
    ] = False,
) -> int:
    """Train adapters that differ in one thing on phantoms whose lesions the host's view loses, and score them.

    The paper's Tables 2 and 4 in small, on a tiny frozen host. Host and pre-trained encoder are made once and kept in
    `--cache`, runs in `--out`: only what is missing takes time. The protocol stands in `bench/ablation/protocol.py`.
    """
    for name, given in (("--rows", rows), ("--start", start), ("--record", record)):
        if quick and given:
            raise cli.BadOption(f"{name}: must not be given with --quick, which has rows and a protocol of its own")
    if rows and start:
        raise cli.BadOption("--rows: must not be given with --start")
    from .run import run

    return run(rows=rows, start=start, seeds=seeds, quick=quick, jobs=jobs, cache=cache, out=out, record=record)


def ablation_detail(out: cli.Out = None, record: cli.Record = False) -> int:
    """Measure what of a phantom's lesion is left in a host's small view, without any language model.

    Twice: for a matched filter that knows everything but whether the lesion is there, and for a small CNN that is
    trained to say so.
    """
    from .detail import run

    return run(out=out, record=record)
