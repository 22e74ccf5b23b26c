"""LLaVA of transformers: CLIP, a projector, LLaMA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .llama import LlamaHost


class LlavaHost(LlamaHost):
    """``LlavaForConditionalGeneration``: visual tokens are the prompt's image tokens, equally many an image."""

    class_name = "LlavaForConditionalGeneration"

    @property
    def text_model(self) -> nn.Module:
        """Return the LLaMA model; transformers moved it with 4.52."""
        inner = getattr(self.model, "model", None)
        if inner is not None and hasattr(inner, "language_model"):
            return inner.language_model
        return self.model.language_model.model

    @property
    def image_token_id(self) -> int:
        """Return the id of ``<image>``; the attribute was renamed with transformers 4.52."""
        config = self.model.config
        token = getattr(config, "image_token_id", None)
        return config.image_token_index if token is None else token

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Return (height, width) that the vision tower takes, pixels."""
        size = getattr(self.model.config.vision_config, "image_size", None)
        if size is None or isinstance(size, int):
            return None if size is None else (size, size)
        return int(size[0]), int(size[1])

    @property
    def image_tokens(self) -> int:
        """Count the tokens that an image has in the prompt: CLIP's patches."""
        patch = getattr(self.model.config.vision_config, "patch_size", None)
        if self.image_size is None or not isinstance(patch, int):
            return 0
        return (self.image_size[0] // patch) * (self.image_size[1] // patch)

    def image_map(self, input_ids: Tensor | None, images: int) -> Tensor | None:
        """Split the image tokens evenly among the images, in order: [B, S].

        Raises:
            ValueError: their number is no multiple of ``images``.
        """
        if input_ids is None or images == 0:
            return None
        mask = (input_ids == self.image_token_id).cpu()
        total = int(mask.sum())
        if total == 0 or total % images:
            raise ValueError(
                f"hia: input_ids must hold the same number of image tokens for each of the {images} images, got "
                f"{total} in all"
            )
        numbers = torch.full(mask.shape, -1, dtype=torch.int64)
        numbers[mask] = torch.arange(total) // (total // images)
        return numbers
