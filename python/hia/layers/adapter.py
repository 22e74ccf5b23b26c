"""The adapter: encoder, and per chosen layer an extractor and an injection."""

from __future__ import annotations

from torch import Tensor, nn

from ..config import HiAConfig
from ..encoder.encoder import build_encoder
from ..renamed import renamed
from .extractor import Extractor
from .features import LayerCache, PackedFeatures
from .injection import Injection
from .layout import CallLayout
from .plan import AUTO


class HiALayer(nn.Module):
    """Condition, extract, inject at one decoder layer (paper, section 3, steps 1 to 3)."""

    def __init__(self, config: HiAConfig, layer: int = 0, shared: nn.Linear | None = None):
        super().__init__()
        self.extractor = Extractor(config, layer, shared)
        self.injection = Injection(config)

    def forward(self, hidden: Tensor, features: PackedFeatures, layout: CallLayout) -> Tensor:
        """[B, S, D1] -> [B, S, D1], with the visual tokens' rows changed; in place where no gradient is recorded."""
        rows = hidden.reshape(-1, hidden.shape[-1])  # [B * S, D1]; a view when the host's output is contiguous
        extracted = self.extractor(rows, layout.instruction_rows, features, layout.image_to_sample)
        return self.injection(rows, layout, extracted).view(hidden.shape)


class HiAAdapter(nn.Module):
    """Everything that is trained: ``encoder``, ``feature_projection`` (released maths only), ``layers``.

    Layers are named by the decoder layer they follow.
    """

    def __init__(self, config: HiAConfig):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.feature_projection: nn.Linear | None = None
        if config.shared_projection:
            self.feature_projection = nn.Linear(config.encoder_channels, config.hidden_size)
        self.layers = nn.ModuleDict(
            {str(index): HiALayer(config, index, self.feature_projection) for index in config.layer_indices}
        )

    def reset_parameters(self) -> None:
        """Initialise everything again, e.g. after ``to_empty`` of an adapter made on the meta device."""
        for module in reversed(list(self.modules())[1:]):  # children before those that adjust them
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def fold_weights(self) -> None:
        """Fold and pack the weights for inference, in the encoder and in every layer."""
        for module in (self.encoder, *(layer.extractor for layer in self.layers.values())):
            module.fold_weights()

    def unfold_weights(self) -> None:
        """Drop what :meth:`fold_weights` made; the parameters were never touched."""
        for module in (self.encoder, *(layer.extractor for layer in self.layers.values())):
            module.unfold_weights()

    prepare, unprepare = renamed("prepare", "fold_weights"), renamed("unprepare", "unfold_weights")

    def layer_caches(self, features: PackedFeatures, keep: str) -> dict[int, LayerCache]:
        """What later questions about these images need of them, by decoder layer.

        Args:
            features: of the images.
            keep: "folded", "kv", or "auto": "kv" in the layers where a later question is cheaper with it.
        """
        found = {}
        for layer in self.layers.values():
            extractor = layer.extractor
            here = features.to(extractor.kv_proj.weight.device)
            if keep != AUTO or extractor.gains_from_keys(here):
                found[extractor.layer_index] = extractor.layer_cache(here, "kv" if keep == AUTO else keep)
        return found

    def layer(self, index: int) -> HiALayer:
        """The modules that follow decoder layer ``index``."""
        return self.layers[str(index)]
