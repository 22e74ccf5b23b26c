"""``latent_attention``: over features that are projected and normed ("folded"), or the features themselves ("deep")."""

from __future__ import annotations

from torch import Tensor

from hia.layers.plan import EXTRA_COLUMNS
from hia_kernels.ops.latent_attention import inputs
from hia_kernels.ops.latent_attention.reference import latent_attention_ref

from .cases import ABSORBING, LayerCase, in_absorbing_set
from .registry import OpEntry


def _reference(q: Tensor, latent: Tensor, lengths: list[int], softmax_scale: float) -> Tensor:
    return latent_attention_ref(q, latent, lengths, softmax_scale)[0]


def _shape(case: LayerCase, role: str) -> inputs.Shape:
    width = case.config.dim if role == "folded" else case.channels + EXTRA_COLUMNS
    return inputs.Shape(case.num_queries * case.config.num_heads, width, tuple(case.feature_lengths))


ENTRY = OpEntry(
    name="latent_attention",
    inputs=inputs,
    reference=_reference,
    cases=ABSORBING,
    roles=("folded", "deep"),
    shape=_shape,
    in_set=in_absorbing_set,
    regression=inputs.Shape(1024, 768, (196, 196)),
)
