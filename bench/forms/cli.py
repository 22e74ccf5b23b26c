"""The commands ``encoder-forms`` and ``deep-forms``."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import cli
from ..records.devices import DTYPES

Numbers = list[int] | None


def encoder_forms(
    px: Annotated[
        Numbers,
        typer.Option("--px", metavar="PX", help="Sides: by default 896 2048.", callback=cli.within(64, 8192)),
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option(
            "--form", metavar="NAME", help="parameters, whole, fresh, onednn, strips, budget; by default all."
        ),
    ] = None,
    budget_mib: Annotated[
        int, typer.Option("--budget-mib", metavar="M", help="Of activations.", callback=cli.within(low=1))
    ] = 128,
    width: Annotated[
        int, typer.Option("--width", metavar="C", help="Of the encoder; 64 is ResNet-50's.", callback=cli.within(low=1))
    ] = 64,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", help="For each side.", callback=cli.within(above=0))
    ] = 30,
) -> int:
    """Time ways to run the folded encoder on the CPU, in turns, with their memory.

    - `parameters`: not folded; each convolution scales its weight first
    - `whole`: folded, every map as a whole
    - `fresh`: the same without the memory that is kept between images
    - `onednn`: the same by oneDNN alone, `HIA_BACKEND=cpu`
    - `strips`: folded, as it is by default: in strips up to the first halving where maps are large
    - `budget`: folded, in strips through the whole network, within `--budget-mib`
    """
    from .encoder import FORMS, run

    forms = cli.some_of("--form", form or FORMS, FORMS)
    return run(px or (896, 2048), forms, width=width, budget_mib=budget_mib, seconds=seconds)


def deep_forms(
    tokens: Annotated[
        Numbers, typer.Option("--tokens", metavar="N", help="Tokens of the image: by default 8192 16384.")
    ] = None,
    channels: Annotated[
        int, typer.Option("--channels", metavar="C", help="Channels of the features, a multiple of 32.")
    ] = 2048,
    dim: Annotated[int, typer.Option("--dim", metavar="D", help="Width of the adapter.")] = 5120,
    queries: Annotated[int, typer.Option("--queries", metavar="M", help="Queries of the adapter.")] = 256,
    heads: Annotated[int, typer.Option("--heads", metavar="H", help="Heads of the attention.")] = 8,
    forms: Annotated[
        list[str] | None, typer.Option("--forms", metavar="NAME", help="Judge these forms. By default all folded ones.")
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            "--features", metavar="NAME", help="Distribution of the features: rectified, far-from-zero, heavy-tailed."
        ),
    ] = "rectified",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="DTYPE", help=f"Dtype that is judged: {', '.join(DTYPES)}.")
    ] = "bf16",
    exact: Annotated[
        str, typer.Option("--exact", metavar="DTYPE", help="Dtype of the reference: fp32 or fp64.")
    ] = "fp32",
    device: cli.Device = "cpu",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of weights and features.")] = 0,
) -> int:
    """Show how exact the extractor's ln_folded forms are in half precision, beside the direct form's own error."""
    from .deep import EXACT, FEATURES, Sizes, run

    if channels % 32:
        raise cli.BadOption(f"--channels: must be a multiple of 32, got {channels}")
    sizes = Sizes(
        channels,
        dim,
        queries,
        heads,
        cli.one_of("--features", features, FEATURES),
        cli.one_of("--dtype", dtype, DTYPES),
        cli.one_of("--exact", exact, EXACT),
        cli.device_of(device),
        seed,
    )
    return run(sizes, tokens or (8192, 16384), forms or ("ln_folded_kv", "ln_folded_absorbed"))
