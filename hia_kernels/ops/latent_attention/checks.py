"""Contracts of ``hia::latent_attention`` and its backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...core.checks import FLOATS, Arg, Contract, like, statistics


class _Images(Contract):
    """The contract of attention image by image: lengths that fit."""

    def __call__(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        sizes, lengths = super().__call__(arguments), arguments["lengths"]
        if len(lengths) != sizes["n"]:
            raise ValueError(
                f"hia::{self.op}: lengths must have one entry for each of the {sizes['n']} images, got {list(lengths)}"
            )
        if any(length < 0 for length in lengths) or sum(lengths) != sizes["T"]:
            raise ValueError(
                f"hia::{self.op}: lengths must be >= 0 and add up to latent's {sizes['T']} rows, got {list(lengths)}"
            )
        return sizes


_INPUTS = {"q": Arg("n G E", FLOATS), "latent": like("q", "T E")}

check = _Images("latent_attention", **_INPUTS)
check_bwd = _Images(
    "latent_attention_bwd", **_INPUTS, dout=like("q", "n G E"), out=like("q", "n G E"), lse=statistics("q", "n G")
)
