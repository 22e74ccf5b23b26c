"""The command ``profile``."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import cli

OURS = "hia"


def profile(
    op: Annotated[str, typer.Argument(help="An op or a composite.")] = "",
    case: Annotated[str, typer.Argument(help="One of its cases, as the tables of `ops` name them.")] = "",
    role: Annotated[
        str, typer.Option("--role", metavar="NAME", help="Where the op has several: by default the first.")
    ] = "",
    provider: Annotated[str, typer.Option("--provider", metavar="NAME", help="Who is profiled.")] = OURS,
    mode: Annotated[
        str | None, typer.Option("--mode", metavar="MODE", help="forward or both; by default both for training steps.")
    ] = None,
    dtype: cli.Dtype = None,
    device: cli.Device = "auto",
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", help="The largest are shown.", callback=cli.within(low=1))
    ] = 16,
    shapes: Annotated[bool, typer.Option("--shapes", help="A row for each op and shapes of its tensors.")] = False,
    furthest: Annotated[
        int | None,
        typer.Option(
            "--furthest",
            metavar="N",
            help="Instead of an op and a case: the rows of ours furthest from their roofline, of the folder's records.",
            callback=cli.within(low=1),
        ),
    ] = None,
    out: cli.Out = None,
    record: cli.Record = False,
) -> int:
    """Show where the time of one call goes, op by op, as a Markdown table."""
    from ..records.environment import device_name
    from ..records.files import results_folder, shown, write_text
    from .run import choose, run
    from .worst import worst

    device = cli.device_of(device)
    folder = results_folder(device_name(device), out=out, record=record)
    if furthest is None:
        chosen = [choose(op, case, role=role, provider=provider, mode=mode, dtype=dtype, device=device)]
    elif any((op, role, provider != OURS, mode, dtype)):
        raise cli.BadOption(
            "--furthest: must not be given with an op, a case, --role, --provider, --mode or --dtype, got one of them"
        )
    else:
        chosen = worst(folder, device, furthest)
    for choice in chosen:
        text = run(choice, rows=rows, shapes=shapes)
        print(text)
        parts = (choice.workload.op, choice.workload.name.replace(":", "-"), choice.provider)
        name = "-".join((*parts, choice.mode) if furthest else parts)
        print(f"\nwritten: {shown(write_text(folder / 'profiles' / f'{name}.md', text + chr(10)))}\n", flush=True)
    return 0
