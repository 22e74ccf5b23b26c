"""The command ``compare``."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import cli


def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Revision to compare the working tree with.")],
    case: Annotated[
        list[str] | None, typer.Option("--case", metavar="NAME", help="Cases of the small set: by default all.")
    ] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", help="Pairs of times a case.", callback=cli.within(low=2))
    ] = 15,
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold",
            metavar="PERCENT",
            help="A median that is slower by more fails.",
            callback=cli.within(above=0),
        ),
    ] = 10,
    out: cli.Out = None,
    record: cli.Record = False,
) -> int:
    """Time this tree and another revision together; fail if it became slower.

    In each round both revisions are timed one after the other, and the round's ratio is now over base; a pair of
    processes has the median of its rounds. Within the threshold in the first pair, a case is the same. Beyond it, two
    more pairs are run, and the pair with the median of all three decides: slower, if it is above 1 + threshold;
    faster, below 1 / (1 + threshold); noisy, if it is either and some pair points the other way; else the same. Only
    slower fails. The line of a case shows the median round of the deciding pair, and the ratios of all pairs.
    """
    from .regression import cases
    from .run import run

    chosen = cli.some_of("--case", case or ["*"], cases())
    return run(base, chosen, rounds=rounds, threshold=threshold / 100, out=out, record=record)
