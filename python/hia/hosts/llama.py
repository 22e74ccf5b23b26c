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

    @property
    def image_tokens(self) -> int:
        """Count the tokens that an image has in the prompt; 0 where only the caller can know it."""
        return 0

    def prefill_bytes(self, tokens: int, itemsize: int, cached: bool = True) -> int:
        """Count the bytes that a prefill takes beside the weights, at least.

        They are the KV cache, and what is alive at once in a layer's MLP: its residual and its input, the gate, what
        the gate is multiplied with, and their product.

        Args:
            tokens: of all prompts, padding included.
            itemsize: bytes of an element.
            cached: whether there is a KV cache.
        """
        config = self.text_model.config
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        cache = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_dim
        return tokens * itemsize * (cached * cache + 2 * config.hidden_size + 3 * config.intermediate_size)

    def image_map(self, input_ids: Tensor | None, images: int) -> Tensor | None:
        """Read the map off the prompt; None where only the caller can know it."""
        return None
