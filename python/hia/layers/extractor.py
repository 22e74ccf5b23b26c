"""Condition and extract: what the instruction asks for, read from the high-resolution features."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hia_kernels

from ..config import HiAConfig
from ..folding import FoldingUnit
from ..unit import unit_forward
from . import plan
from .features import PackedFeatures
from .folded import FoldedExtractor, fold_extractor, folding_bytes
from .shared import SharedProjection

KEY_VALUE_FORMS = ("direct", "folded", "ln_folded_kv")
FOLDING_FORMS = ("folded", "folded_absorbed", "ln_folded_kv", "ln_folded_absorbed")  # these read folded weights
SHARED_FORMS = ("direct", "absorbed")  # these read the released maths' shared projection as it is
# h_N is not normed, and its entries are of size 1 and more in trained hosts: at full gain the one vector that all
# queries get would outweigh what tells them apart.
CONDITION_GAIN = 0.1
LARGEST_CACHE = 2**30  # bytes a layer keeps of one set of images without being told to


class Extractor(FoldingUnit[FoldedExtractor]):
    """Z̄ = CrossAtten(Q + Linear(h_N), Linear(Z)): M learnable queries read one image's features (paper, section 3).

    The conditioned queries are one set per sample, whatever the number of its images. The maths has several exact
    forms; :mod:`hia.layers.plan` picks one by the sizes of the call, and ``form`` forces one.

    Args:
        config: of the adapter.
        layer: decoder layer it belongs to: the key of caches kept for it.
        shared: the released maths' projection, a unit of the adapter.
    """

    def __init__(self, config: HiAConfig, layer: int = 0, shared: SharedProjection | None = None):
        super().__init__()
        dim = config.dim
        channels = config.hidden_size if config.shared_projection else config.encoder_channels
        self.num_heads, self.head_dim, self.num_queries = config.num_heads, config.head_dim, config.num_queries
        self.query_std, self.init, self.residual = config.query_std, config.init, config.query_residual
        self.layer_index, self.form = layer, plan.AUTO
        self.sharing = len(config.layer_indices) if config.shared_projection else 0
        self.hidden_size, self.channels = config.hidden_size, config.encoder_channels
        self._shared = (shared,)  # in a tuple, or its parameters would be registered here too
        self.queries = nn.Parameter(torch.empty(config.num_queries, dim, dtype=torch.get_default_dtype()))  # as nn's
        self.condition = nn.Linear(config.hidden_size, dim) if config.instruction_aware else None
        self.feature_projection = nn.Linear(channels, dim)
        self.query_norm = nn.LayerNorm(dim)
        self.feature_norm = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise queries and, as ``HiAConfig.init`` says, the projections (norms have reset themselves)."""
        nn.init.normal_(self.queries, std=self.query_std)
        if self.init == "lecun_normal":
            unit_variance_(self.feature_projection, self.q_proj, self.kv_proj, self.out_proj)
            if self.condition is not None:
                unit_variance_(self.condition, gain=CONDITION_GAIN)

    def weights(self) -> list[Tensor]:
        """List all parameters that keys and values depend on."""
        modules = (*self._shared, self.feature_projection, self.feature_norm, self.kv_proj)
        return [parameter for module in modules if module is not None for parameter in module.parameters()]

    def folded_modules(self) -> list[nn.Module]:
        """List this unit's modules, and the shared projection's."""
        (shared,) = self._shared
        return [*self.modules(), *(() if shared is None else shared.modules())]

    def check_in_place(self, action: str) -> None:
        """Refuse an action on weights that don't stay, those of the shared projection included."""
        super().check_in_place(action)
        (shared,) = self._shared
        if shared is not None:
            shared.check_in_place(action)

    def folding_bytes(self) -> int:
        """Count the bytes that folding takes at its peak."""
        return folding_bytes(self.feature_projection, self.kv_proj, self.channels)

    def _made(self) -> FoldedExtractor:
        (shared,) = self._shared
        own = (self.feature_projection, self.feature_norm, self.kv_proj)
        if shared is None:
            return fold_extractor(*own, self.weight_version())
        return shared.inside(fold_extractor, *own, self.weight_version(), shared)

    def fold_by_itself(self, features: PackedFeatures, samples: int) -> None:
        """Fold the weights if they were the same in an earlier call, and the form this one takes would read them.

        The adapter has looked at all layers' weights before (:func:`hia.folding.drop_changed`).
        """
        if self._folded is not None or torch.is_grad_enabled():
            self.count_call(checked=True)
            return
        sizes = dataclasses.replace(self.sizes(features, samples), weights_folded=True)
        device = self.kv_proj.weight.device.type
        gains = self.form in (plan.AUTO, *FOLDING_FORMS) and plan.choose("extract", self.form, sizes, device)
        # a form that was forced and reads folded weights can't run without them
        self.count_call(pays=gains in FOLDING_FORMS, at_once=self.form in FOLDING_FORMS)

    def condition_queries(self, hidden: Tensor, instruction_rows: Tensor) -> Tensor:
        """Condition the queries (Eq. 2): hidden [T, D1], instruction_rows [B] -> [B, M, D]; unaware, they stay."""
        if self.condition is None:
            return self.queries.expand(instruction_rows.shape[0], -1, -1)
        return hia_kernels.condition_queries(
            hidden, instruction_rows, self.condition.weight, self.condition.bias, self.queries
        )

    @unit_forward
    def forward(
        self, hidden: Tensor, instruction_rows: Tensor, features: PackedFeatures, image_to_sample: Tensor
    ) -> Tensor:
        """Extract from every image what its sample's instruction asks for.

        Args:
            hidden: [T, D1] hidden states of the packed tokens.
            instruction_rows: [B] int64, row of each sample's last instruction token.
            features: of n images.
            image_to_sample: [n] int64 in ``[0, B)``.

        Returns:
            [n * M, D].
        """
        conditioned = self.condition_queries(hidden, instruction_rows)  # [B, M, D]
        batch, num_queries, dim = conditioned.shape
        q = norm_project(conditioned.reshape(-1, dim), self.query_norm, self.q_proj)  # [B * M, D]
        q = q.view(batch, num_queries, self.num_heads, self.head_dim)
        form = self.form_for(features, batch)
        if form.endswith("absorbed") or form == "cached_folded":
            out = self._attend_to_latent(q, features, image_to_sample, form)
        else:
            out = self._attend(q, features, image_to_sample, form)
        extracted = hia_kernels.linear(out, self.out_proj.weight, self.out_proj.bias)  # [n * M, D]
        return extracted + conditioned[image_to_sample].flatten(0, 1) if self.residual else extracted

    def form_for(self, features: PackedFeatures, samples: int) -> str:
        """Choose the form that a call about these images takes now."""
        return plan.choose("extract", self.form, self.sizes(features, samples), features.tokens.device.type)

    def reads_shared(self, features: PackedFeatures, samples: int) -> bool:
        """Tell whether that form reads :meth:`PackedFeatures.shared`; a folded one goes past it."""
        return self.sharing > 0 and self.form_for(features, samples) in SHARED_FORMS

    def read_by(self, form: str, features: PackedFeatures) -> tuple[str, Tensor]:
        """Return what a form reads of the features, and what that is called.

        Returns:
            "tokens", "shared", "widened", or the kind of what was kept for this layer; [T, ...].
        """
        (shared,) = self._shared
        if form.startswith("cached"):
            return features.caches[self.layer_index].kind, features.caches[self.layer_index].tokens
        if form.startswith("ln_folded"):
            return "widened", features.widened()
        if shared is not None and form in SHARED_FORMS:
            return "shared", features.shared(shared)
        return "tokens", features.tokens

    def sizes(self, features: PackedFeatures, samples: int) -> plan.Sizes:
        """Collect what the plan is made from, for these images."""
        training = torch.is_grad_enabled()
        cache = None if training else features.caches.get(self.layer_index)
        return plan.Sizes(
            hidden_size=self.hidden_size,
            dim=self.num_heads * self.head_dim,
            heads=self.num_heads,
            queries=self.num_queries,
            channels=self.channels,
            samples=samples,
            features=features.lengths,
            sharing=self.sharing,
            itemsize=features.tokens.element_size(),
            training=training,
            weights_folded=not training and self.current() is not None,
            cached=() if cache is None else (cache.kind,),
        )

    def cached_tokens(self, features: PackedFeatures, kind: str) -> Tensor:
        """Compute what later questions about these images need of them; run it :meth:`inside`.

        Args:
            features: of the images.
            kind: "folded" or "kv".

        Returns:
            [T, D] for "folded", else [T, 2 * D].
        """
        features = features.to(self.kv_proj.weight.device)
        if kind == "kv":
            forms = [form for form in plan.extract_forms(self.sizes(features, 1)) if form.name in KEY_VALUE_FORMS]
            ceilings = plan.ceilings_of(features.tokens.device.type, features.tokens.element_size())
            return self._key_values(features, plan.cheapest(forms, ceilings).name)
        form = "folded" if self.sharing and self.current() is not None else "direct"
        return self._normed(self._projected(features, form))

    def gains_from_keys(self, features: PackedFeatures) -> bool:
        """Tell whether a question about these images is cheaper with their keys and values, and these are small."""
        nbytes = features.tokens.shape[0] * 2 * self.num_heads * self.head_dim * features.tokens.element_size()
        sizes = dataclasses.replace(self.sizes(features, 1), cached=("kv",))
        ceilings = plan.ceilings_of(features.tokens.device.type, sizes.itemsize)
        return nbytes <= LARGEST_CACHE and plan.cheapest(plan.extract_forms(sizes), ceilings).name == "cached_kv"

    def _projected(self, features: PackedFeatures, form: str) -> Tensor:
        """Project the features: [T, D] before the norm."""
        (shared,) = self._shared
        own = self.feature_projection
        if shared is None:
            return hia_kernels.linear(features.tokens, own.weight, own.bias)
        if form in SHARED_FORMS:
            return hia_kernels.linear(features.shared(shared), own.weight, own.bias)
        folded = None if torch.is_grad_enabled() else self.current()
        if folded is not None:
            return hia_kernels.linear(features.tokens, folded.fold_weight, folded.fold_bias)
        return hia_kernels.linear(features.tokens, *shared.inside(shared.folded_into, own.weight, own.bias))

    def _normed(self, projected: Tensor) -> Tensor:
        norm = self.feature_norm
        return F.layer_norm(projected, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def _scaled(self, features: PackedFeatures) -> tuple[Tensor, FoldedExtractor]:
        """Divide the widened features by the deviation of their projection: [T, C + 16]."""
        folded = self.current()
        if folded is None:
            raise RuntimeError("hia: the ln_folded forms must have fold_weights() behind them, got none")
        wide = features.widened()
        exact = torch.float64 if wide.dtype == torch.float64 else torch.float32
        variance = hia_kernels.linear(wide, folded.root).to(exact).square().sum(-1, keepdim=True)  # [T, 1]
        return (wide * torch.rsqrt(variance + self.feature_norm.eps)).to(wide.dtype), folded

    def _key_values(self, features: PackedFeatures, form: str) -> Tensor:
        """Compute keys and values: [T, 2 * D]."""
        if form == "ln_folded_kv":
            scaled, folded = self._scaled(features)
            return hia_kernels.linear(scaled, folded.kv_weight, folded.kv_bias)
        return norm_project(self._projected(features, form), self.feature_norm, self.kv_proj)

    def _attend(self, q: Tensor, features: PackedFeatures, image_to_sample: Tensor, form: str) -> Tensor:
        """Attend to keys and values of every token, fused: q [B, M, H, d] -> [n * M, D]."""
        if form == "cached_kv":
            kv = features.caches[self.layer_index].tokens
        else:
            kv = self._key_values(features, form)
        k, v = kv.view(-1, 2, self.num_heads, self.head_dim).unbind(1)
        images, num_queries = image_to_sample.shape[0], q.shape[1]
        q = q[image_to_sample].flatten(0, 1)  # [n * M, H, d]
        out = hia_kernels.cross_attention(
            q, k, v, even_cu_seqlens(images, num_queries, q), features.cu_seqlens, num_queries, features.max_seqlen
        )
        return out.flatten(1)

    def _attend_to_latent(self, q: Tensor, features: PackedFeatures, image_to_sample: Tensor, form: str) -> Tensor:
        """Attend with keys' and values' projections absorbed by queries and results: q [B, M, H, d] -> [n * M, D]."""
        dim, heads = self.num_heads * self.head_dim, self.num_heads
        weight, bias = self.kv_proj.weight, self.kv_proj.bias
        if form == "ln_folded_absorbed":
            latent, folded = self._scaled(features)
            weight, bias = folded.kv_weight, folded.kv_bias
        elif form == "cached_folded":
            latent = features.caches[self.layer_index].tokens
        else:
            latent = self._normed(self._projected(features, form))
        key_weight, value_weight = weight.view(2, heads, self.head_dim, -1).unbind(0)  # [H, d, E]
        absorbed = hia_kernels.head_linear(q.transpose(1, 2), key_weight.mT).flatten(1, 2)  # [B, H * M, E]
        images = image_to_sample.shape[0]
        absorbed = absorbed.expand(images, -1, -1) if q.shape[0] == 1 else absorbed[image_to_sample]  # [n, H * M, E]
        out = hia_kernels.latent_attention(absorbed, latent.to(absorbed.dtype), features.lengths, self.head_dim**-0.5)
        out = out.view(images, heads, -1, out.shape[-1])
        out = hia_kernels.head_linear(out, value_weight.to(out.dtype), merge_heads=True)  # [n, M, D]
        return out.flatten(0, 1) + bias[dim:]


def unit_variance_(*linears: nn.Linear, gain: float = 1.0) -> None:
    """Start linears so that inputs of variance 1 give outputs of variance ``gain**2``, with zero biases.

    LeCun's normal start (Efficient BackProp, 1998). ``nn.Linear``'s own is a third of that variance with biases as
    large as what follows from the input, which makes all queries, keys and visual tokens alike.
    """
    for linear in linears:
        nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)


def norm_project(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear, row_idx: Tensor | None = None) -> Tensor:
    """Compute Linear(LayerNorm(x[row_idx])) from two modules' parameters."""
    return hia_kernels.norm_linear(x, norm.weight, norm.bias, linear.weight, linear.bias, row_idx, norm.eps)


def even_cu_seqlens(sequences: int, length: int, like: Tensor) -> Tensor:
    """Count up [sequences + 1] int32 for sequences of one length, on the device of ``like``."""
    return torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32, device=like.device)
