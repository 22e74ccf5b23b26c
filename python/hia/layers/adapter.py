"""The adapter: an encoder, and an extractor and an injection for each chosen layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import HiAConfig
from ..encoder.encoder import Encoder, build_encoder
from ..folding import drop_changed
from ..renamed import renamed
from ..unit import Unit, unit_forward
from .extractor import Extractor
from .features import ImageFeatures, LayerCache, PackedFeatures
from .forms import AUTO, split_plan
from .graphs import LayerGraphs
from .injection import Injection
from .layout import CallLayout
from .shared import SharedProjection


class HiALayer(Unit):
    """Condition, extract, inject at one decoder layer (paper, section 3, steps 1 to 3)."""

    def __init__(
        self,
        config: HiAConfig,
        layer: int = 0,
        shared: SharedProjection | None = None,
        graphs: LayerGraphs | None = None,
    ):
        super().__init__()
        self.extractor = Extractor(config, layer, shared)
        self.injection = Injection(config)
        self.graphs = LayerGraphs() if graphs is None else graphs

    @unit_forward
    def forward(self, hidden: Tensor, features: PackedFeatures, layout: CallLayout) -> Tensor:
        """Change the visual tokens' rows: [B, S, D1] -> [B, S, D1]; in place where no gradient is recorded."""
        rows = hidden.reshape(-1, hidden.shape[-1])  # [B * S, D1]; a view when the host's output is contiguous
        return self.graphs(self, rows, features, layout, self._on_rows).view(hidden.shape)

    def _on_rows(self, rows: Tensor, features: PackedFeatures, layout: CallLayout) -> Tensor:
        extracted = self.extractor(rows, layout.instruction_rows, features, layout.image_to_sample)
        return self.injection(rows, layout, extracted)


class HiAAdapter(nn.Module):
    """All that is trained: ``encoder``, ``feature_projection`` (released maths only), ``layers``.

    Layers are named by the decoder layer they follow.

    Attributes:
        plan: the exact forms of the maths that run, as :meth:`set_plan` takes them.
        graphs: CUDA graphs of the layers, and the memory that they share.
    """

    def __init__(self, config: HiAConfig):
        super().__init__()
        self.config, self.plan, self.graphs = config, AUTO, LayerGraphs()
        self.encoder = build_encoder(config)
        self.feature_projection: SharedProjection | None = None
        if config.shared_projection:
            self.feature_projection = SharedProjection(config.encoder_channels, config.hidden_size)
        self.layers = nn.ModuleDict(
            {
                str(index): HiALayer(config, index, self.feature_projection, self.graphs)
                for index in config.layer_indices
            }
        )

    def reset_parameters(self) -> None:
        """Initialise everything again, e.g. after ``to_empty`` of an adapter made on the meta device."""
        for module in reversed(list(self.modules())[1:]):  # children before those that adjust them
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HiAAdapter:
        """Cast or move the weights, and drop the graphs, which read them where they were."""
        super()._apply(fn, recurse)
        self.graphs.clear()
        return self

    def train(self, mode: bool = True) -> HiAAdapter:
        """Set the mode; training needs the graphs' memory for other things."""
        super().train(mode)
        if mode:
            self.graphs.clear()
        return self

    def set_plan(self, plan: str) -> None:
        """Choose the exact forms of the maths.

        Args:
            plan: "auto", the cheapest for the sizes of each call; "<extract>/<inject>" with names of
                :mod:`hia.layers.forms`; or one name for both.

        Raises:
            ValueError: no such form.
        """
        extract, inject = split_plan(plan)
        for layer in self.layers.values():
            layer.extractor.form, layer.injection.form = extract, inject
        self.plan = AUTO if extract == inject == AUTO else f"{extract}/{inject}"

    @property
    def cuda_graphs(self) -> bool:
        """Tell whether folded weights may be used through CUDA graphs, in the encoder and in every layer."""
        return self.graphs.enabled and self.encoder.cuda_graphs

    def set_cuda_graphs(self, cuda_graphs: bool) -> None:
        """Allow CUDA graphs, or do without them and drop those there are.

        Raises:
            ValueError: neither True nor False.
        """
        if not isinstance(cuda_graphs, bool):
            raise ValueError(f"hia: cuda_graphs must be True or False, got {cuda_graphs!r}")
        self.graphs.enabled = self.encoder.cuda_graphs = cuda_graphs
        if not cuda_graphs:
            self.graphs.clear()
            self.encoder.drop_graphs()

    def folding_units(self) -> list[Encoder | Extractor]:
        """List the modules whose weights can be folded: the encoder, and every layer's extractor."""
        return [self.encoder, *(layer.extractor for layer in self.layers.values())]

    def fold_weights(self) -> None:
        """Fold and pack the weights for inference, in the encoder and in every layer."""
        for unit in self.folding_units():
            unit.fold_weights()
        self.graphs.clear()  # they hold the weights that were folded before

    def unfold_weights(self) -> None:
        """Drop all folded weights, and let none fold by themselves; the parameters were never touched."""
        for unit in self.folding_units():
            unit.unfold_weights()
        self.graphs.clear()

    @property
    def auto_fold(self) -> bool:
        """Tell whether weights fold by themselves."""
        return all(unit.auto_fold for unit in self.folding_units())

    def set_auto_fold(self, auto_fold: bool) -> None:
        """Choose whether weights fold by themselves; see :meth:`hia.folding.FoldingUnit.set_auto_fold`."""
        for unit in self.folding_units():
            unit.set_auto_fold(auto_fold)
        if not auto_fold:
            self.graphs.clear()  # some hold weights that folded by themselves

    @torch.compiler.disable  # compares the weights' versions, which a graph would take for constants
    def fold_by_itself(self, features: PackedFeatures, samples: int) -> None:
        """Take note of a call before its layers run, outside of them: fold what repeats, drop what is out of date.

        Args:
            features: of the call's images.
            samples: prompts that they belong to.
        """
        extractors = [layer.extractor for layer in self.layers.values()]
        drop_changed(extractors)
        for extractor in extractors:
            extractor.fold_by_itself(features, samples)

    def folding_state(self) -> str:
        """Say, for the encoder and for the extractors, whether weights are folded, and the bytes that takes."""
        lines = []
        for name, units in (("encoder", self.folding_units()[:1]), ("extractors", self.folding_units()[1:])):
            states = sorted({unit.folding_state() for unit in units})
            nbytes = sum(0 if (folded := unit.current()) is None else folded.nbytes for unit in units)
            lines.append(f"weights of the {name}: {' and '.join(states)}, {nbytes / 2**20:.1f} MiB\n")
        return "".join(lines)

    prepare, unprepare = renamed("prepare", "fold_weights"), renamed("unprepare", "unfold_weights")

    def layer_caches(self, features: PackedFeatures, keep: str) -> dict[int, LayerCache]:
        """Compute what later questions about these images need of them, by decoder layer.

        Args:
            features: of the images.
            keep: "folded", "kv", or "auto": "kv" in the layers where a later question is cheaper with it.
        """
        found = {}
        for layer in self.layers.values():
            extractor = layer.extractor
            if keep != AUTO or extractor.gains_from_keys(features):
                kind, version = "kv" if keep == AUTO else keep, extractor.weight_version()
                tokens = layer.inside(extractor.inside, extractor.cached_tokens, features, kind)
                found[extractor.layer_index] = LayerCache(kind, tokens, version)
        return found

    @torch.compiler.disable  # compares the weights' versions, which a graph would take for constants
    def packed(self, features: ImageFeatures) -> PackedFeatures:
        """Join the features of several images, without what was kept before a weight changed."""
        extractors = [layer.extractor for layer in self.layers.values()]
        return features.packed({extractor.layer_index: extractor.weight_version() for extractor in extractors})

    def layer(self, index: int) -> HiALayer:
        """Return the modules that follow decoder layer ``index``."""
        return self.layers[str(index)]
