"""The command ``end-to-end``."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import cli

Names = list[str] | None
Providers = Annotated[
    Names,
    typer.Option("--provider", metavar="NAME", help="plain, baseline, anyres, released, hia. By default all."),
]
Quantities = Annotated[
    Names,
    typer.Option(
        "--op", metavar="NAME", help="time_to_first_token, second_question, decode, train_step. By default all."
    ),
]
Resolutions = Annotated[
    Names,
    typer.Option("--resolutions", metavar="PX", help="By default 448 896 on the CPU, 896 448 1792 on CUDA."),
]
Deadline = Annotated[
    int | None,
    typer.Option(
        "--deadline",
        metavar="S",
        help="Seconds for the whole run, memory last; what is left then is recorded so. By default 900 on the CPU.",
        callback=cli.within(1, 86400),
    ),
]
NewTokens = Annotated[
    int, typer.Option("--new-tokens", metavar="N", help="Decode steps a repetition.", callback=cli.within(1, 512))
]
Repeats = Annotated[
    int, typer.Option("--repeats", metavar="N", help="Timed repetitions, at most.", callback=cli.within(1, 1000))
]


def end_to_end(
    provider: Providers = None,
    op: Quantities = None,
    resolutions: Resolutions = None,
    batch: Annotated[Names, typer.Option("--batch", metavar="N", help="Prompts at a time. By default 1 4.")] = None,
    images_per_prompt: Annotated[
        int, typer.Option("--images-per-prompt", metavar="N", help="2 are a comparison.", callback=cli.within(1, 64))
    ] = 2,
    text_tokens: Annotated[
        int, typer.Option("--text-tokens", metavar="N", help="Tokens beside the images'.", callback=cli.within(8, 4096))
    ] = 60,
    new_tokens: NewTokens = 8,
    dtype: cli.Dtype = None,
    attention: Annotated[str, typer.Option("--attention", metavar="NAME", help="The host's: sdpa or eager.")] = "sdpa",
    device: cli.Device = "auto",
    repeats: Repeats = 4,
    budget: Annotated[
        int, typer.Option("--budget", metavar="S", help="Seconds a case, roughly.", callback=cli.within(1, 3600))
    ] = 10,
    deadline: Deadline = None,
    images: cli.Images = None,
    resume: cli.Resume = False,
    listing: cli.Listing = False,
    out: cli.Out = None,
    record: cli.Record = False,
    json: cli.Json = None,
) -> int:
    """Time one question to a whole model, in five ways of reading a large image; and its memory.

    Time to the first token, of a second question on the same images, of a decoded token and of a training step.
    LLaVA-13B's shapes in bf16 on CUDA, a small host in fp32 on the CPU, both with random weights. The exit code is 1 if
    something failed that should run, and 130 after Ctrl-C. A file of results keeps the records of other cases.
    """
    from .plan import make_options, plan, print_plan
    from .run import run

    options = make_options(
        names={"provider": provider, "op": op},
        sizes={"resolutions": resolutions, "batch": batch},
        device=device,
        listing=listing,
        dtype=dtype,
        attention=attention,
        images=images,
        counts={
            "images_per_prompt": images_per_prompt,
            "text_tokens": text_tokens,
            "new_tokens": new_tokens,
            "repeats": repeats,
            "budget": budget,
            "deadline": deadline,
        },
    )
    if listing:
        print_plan(plan(options))
        return 0
    return run(options, out=out, record=record, json=json, resume=resume)
