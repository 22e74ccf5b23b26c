"""The command ``table3``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import cli
from ..records.devices import DTYPES

Names = list[str] | None
Methods = Annotated[
    Names, typer.Option("--methods", metavar="NAME", help="baseline, anyres, released, hia. By default all.")
]
Resolutions = Annotated[
    Names, typer.Option("--resolutions", metavar="PX", help="Sides of the images. By default 448 to 4096.")
]
Attentions = Annotated[
    Names,
    typer.Option("--attention", metavar="NAME", help="Show memory with this attention: eager, sdpa. By default both."),
]
CardGB = Annotated[
    float,
    typer.Option(
        "--card-gb", metavar="GB", help="Card of the column 'fits', in 1e9 bytes.", callback=cli.within(above=0)
    ),
]
HostConfig = Annotated[
    Path | None,
    typer.Option("--host-config", metavar="PATH", help="config.json of another LLaMA instead of LLaMA-2-13B."),
]
ImagesPerSample = Annotated[
    int,
    typer.Option(
        "--images-per-sample",
        metavar="N",
        help="Images in the one sample: 2 are a comparison.",
        callback=cli.within(1, 64),
    ),
]


def table3(
    methods: Methods = None,
    resolutions: Resolutions = None,
    images_per_sample: ImagesPerSample = 2,
    text_tokens: Annotated[
        int, typer.Option("--text-tokens", metavar="N", help="Tokens beside the images'.", callback=cli.within(1, 4096))
    ] = 60,
    unit: Annotated[
        str, typer.Option("--unit", metavar="UNIT", help="Show flops, 2 a multiply-add, or macs; the JSON has both.")
    ] = "flops",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", metavar="DTYPE", help=f"Dtype of the 13B host's weights and activations: {', '.join(DTYPES)}."
        ),
    ] = "bf16",
    attention: Attentions = None,
    card_gb: CardGB = 32.0,
    host_config: HostConfig = None,
    device: cli.Device = "auto",
    skip_measured: Annotated[
        bool, typer.Option("--skip-measured", "--no-measure", help="Predict only, run nothing.")
    ] = False,
    images: cli.Images = None,
    resume: cli.Resume = False,
    out: cli.Out = None,
    record: cli.Record = False,
    json: cli.Json = None,
    readme: Annotated[
        bool, typer.Option("--readme", help="Run nothing; renew the table in README.md from its record.")
    ] = False,
) -> int:
    """Recompute the paper's Table 3: FLOPs and peak memory of a prefill, baseline against HiA.

    What the 13B host costs is followed under fake tensors, on any machine. What the machine can hold is really run: the
    13B host on CUDA, a small host of the same architecture on the CPU. The exit code is 1 if a check fails, and 130
    after Ctrl-C.
    """
    if readme:
        from .readme import renew

        print(renew())
        return 0
    from .run import make_options, run

    options = make_options(
        methods=methods,
        resolutions=resolutions,
        attention=attention,
        host_config=host_config,
        device=device,
        skip_measured=skip_measured,
        images=images,
        protocol={
            "images_per_sample": images_per_sample,
            "text_tokens": text_tokens,
            "unit": cli.one_of("--unit", unit, ("flops", "macs")),
            "dtype": cli.one_of("--dtype", dtype, DTYPES),
            "card_gb": card_gb,
        },
    )
    return run(options, out=out, record=record, json=json, resume=resume)
