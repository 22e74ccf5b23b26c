"""The contexts of one prompt and of one run of the decoder layers, and how they are read off a call's arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..hosts import LlamaHost
from ..layers.features import PackedFeatures
from ..layers.layout import CallLayout, VisualLayout, build_layout, left_padded


@dataclass
class PromptContext:
    """A prompt with images, for the time of one forward or generate.

    Attributes:
        features: of its images.
        layout: where its visual tokens stand.
        generating: several forwards may come, the first with the whole prompt.
        started: the prompt has been seen.
    """

    features: PackedFeatures
    layout: VisualLayout
    generating: bool
    started: bool = False
    placed: dict[torch.device, PackedFeatures] = field(default_factory=dict)

    def features_on(self, device: torch.device) -> PackedFeatures:
        """Return the features where a layer lives; each device gets them once."""
        if self.features.tokens.device == device:
            return self.features
        if device not in self.placed:
            self.placed[device] = self.features.to(device)
        return self.placed[device]


@dataclass(frozen=True)
class ForwardContext:
    """One run of the decoder layers over the whole prompt."""

    prompt: PromptContext
    layout: CallLayout


def layout_of(
    host: LlamaHost,
    images: int,
    image_map: Tensor | None,
    instruction_index: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> VisualLayout:
    """Find where a prompt's visual tokens stand.

    Args:
        host: that may know them by its prompt.
        images: how many came with it.
        image_map: as :meth:`hia.HiAModel.forward` takes it.
        instruction_index: likewise.
        args: of the base model.
        kwargs: of the base model.

    Raises:
        ValueError: no ``instruction_index``, a map that is missing or doesn't fit.
    """
    if instruction_index is None:
        raise ValueError(
            "hia: instruction_index must be given with images, got None; HiAProcessor returns it, and it is "
            "never assumed to be the last token"
        )
    input_ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    if image_map is None:
        image_map = host.image_map(input_ids, images)
    if image_map is None:
        raise ValueError("hia: image_map must be given for this host, got None; it says which rows are visual tokens")
    if input_ids is not None and tuple(input_ids.shape) != tuple(image_map.shape):
        raise ValueError(
            f"hia: image_map must have the shape of input_ids {list(input_ids.shape)}, got {list(image_map.shape)}"
        )
    return build_layout(image_map, instruction_index, images, kwargs.get("attention_mask"))


def pad_left(kwargs: dict[str, Any]) -> Tensor | None:
    """Move right padding in ``generate``'s keyword arguments, in place of the dict.

    Returns:
        The mask as it is then, on the CPU: it comes down once, for this and for the checks.
    """
    mask, input_ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    if mask is None:
        return None
    here: Tensor = mask.cpu()
    if input_ids is None or mask.shape != input_ids.shape or bool(here[:, -1].all()):
        return here
    names = [name for name in ("input_ids", "image_map", "instruction_index") if name in kwargs]
    kwargs["attention_mask"], moved = left_padded(mask, **{name: kwargs[name] for name in names})
    kwargs.update(moved)
    return left_padded(here)[0]
