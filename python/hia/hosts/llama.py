"""LLaMA, and what every host offers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class LlamaHost:
    """``LlamaForCausalLM``: visual tokens are whatever the caller's ``image_map`` says."""

    class_name = "LlamaForCausalLM"

    def __init__(self, model: Any):
        self.model = model

    @classmethod
    def accepts(cls, model: Any) -> bool:
        """Tell whether the model is this kind of host; by class, including subclasses."""
        return any(base.__name__ == cls.class_name for base in type(model).__mro__)

    @property
    def text_model(self) -> nn.Module:
        """Return the module whose forward runs the decoder layers."""
        return self.model.model

    @property
    def layers(self) -> nn.ModuleList:
        """Return the decoder layers."""
        return self.text_model.layers

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Return (height, width) of the images that the host sees, pixels; None where only the caller can know it."""
        return None

    def image_map(self, input_ids: Tensor | None, images: int) -> Tensor | None:
        """Read the map off the prompt; None where only the caller can know it."""
        return None
