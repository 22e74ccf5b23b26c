"""The hooks on a frozen host: one on its inputs, two around its language model, one on each chosen decoder layer.

Nothing is stored in the host.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..hosts import LlamaHost
from ..layers.adapter import HiAAdapter
from .context import ForwardContext, PromptContext

_CACHE_MARK = "_hia_holds_injected_tokens"


def split_layer_output(output: Any) -> tuple[Tensor, Any]:
    """Return the hidden states of a decoder layer's output, and a function that puts others in their place.

    transformers returns a tensor, a tuple or a ModelOutput, depending on its version.
    """
    if isinstance(output, Tensor):
        return output, lambda hidden: hidden
    if isinstance(output, tuple):
        return output[0], lambda hidden: (hidden, *output[1:])
    if hasattr(output, "keys"):
        name = next(iter(output.keys()))

        def rejoin(hidden: Tensor) -> Any:
            output[name] = hidden
            return output

        return output[name], rejoin
    raise TypeError(f"hia: a decoder layer must return a tensor, a tuple or a ModelOutput, got {type(output).__name__}")


class InjectionHooks:
    """Runs the adapter on a host's decoder layers while a prompt is open."""

    def __init__(self, host: LlamaHost, adapter: HiAAdapter):
        self.adapter = adapter
        self.prompt: PromptContext | None = None
        self.running: ForwardContext | None = None
        # Gradient checkpointing runs a layer again in the backward pass, when the forward is long over. The
        # rotary embeddings are the tensor that every layer of one forward shares, then and now.
        self._running_by_rotary: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        text_model = host.text_model
        self._handles = [
            host.model.register_forward_pre_hook(self._arrange_pixels, with_kwargs=True),
            text_model.register_forward_pre_hook(self._enter, with_kwargs=True),
            text_model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        for index in adapter.config.layer_indices:
            hook = partial(self._inject, index)
            # First of all hooks, so that recorded hidden states are the injected ones.
            self._handles.append(host.layers[index].register_forward_hook(hook, with_kwargs=True, prepend=True))

    def remove(self) -> None:
        """Take every hook off the host."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _arrange_pixels(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give each beam its own sample's images.

        transformers repeats every entry of ``pixel_values`` as often as a sample has beams, which is right for one
        image a sample only; with more, or fewer, beams would see other samples' images.
        """
        pixels = kwargs.get("pixel_values")
        if self.prompt is None or not self.prompt.generating or pixels is None:
            return None
        layout = self.prompt.layout
        images = layout.image_to_sample.shape[0]
        copies = pixels.shape[0] // images
        if copies < 2 or pixels.shape[0] != copies * images:
            return None
        return args, {**kwargs, "pixel_values": pixels[layout.image_order(copies).to(pixels.device)]}

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeds = kwargs.get("inputs_embeds")
        tokens = embeds if embeds is not None else kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            return  # the host has its own error for that
        batch, length = tokens.shape[:2]
        prompt, self.running = self.prompt, None
        if prompt is None:
            refuse_injected_cache(kwargs.get("past_key_values"), length)
            return
        expected = prompt.layout.seq_len
        if length < expected:
            if prompt.started:
                return  # a decode step: no visual token in the slice
            refuse_chunked_prefill(expected, length)
        if length > expected and not prompt.generating:
            raise ValueError(
                f"hia: image_map must cover the {length} tokens the decoder layers see, got {expected}; are tokens "
                f"prepended by another adapter?"
            )
        prompt.started = True
        self.running = ForwardContext(prompt, prompt.layout.for_call(batch, length, tokens.device))

    def _leave(self, _module: nn.Module, _args: Any, _kwargs: dict[str, Any], output: Any) -> None:
        running, self.running = self.running, None
        cache = getattr(output, "past_key_values", None)
        if running is not None and cache is not None:
            setattr(cache, _CACHE_MARK, True)

    def _inject(self, index: int, layer: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        running = self.running
        if running is None:
            running = self._recomputed(kwargs)
            if running is None:
                return None
        elif layer.training and not torch.compiler.is_compiling():
            rotary = _rotary(kwargs)
            if rotary is not None:
                self._running_by_rotary[rotary] = running
        hidden, rejoin = split_layer_output(output)
        features, layout = running.prompt.features_on(hidden.device), running.layout.to(hidden.device)
        return rejoin(self.adapter.layer(index)(hidden, features, layout))

    def _recomputed(self, kwargs: dict[str, Any]) -> ForwardContext | None:
        """Find the forward that gradient checkpointing runs a layer of again; None in other calls."""
        if torch.compiler.is_compiling() or not self._running_by_rotary:
            return None
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass
            return None
        rotary = _rotary(kwargs)
        running = None if rotary is None else self._running_by_rotary.get(rotary)
        if running is None:
            raise RuntimeError(
                "hia: a decoder layer is run again in the backward pass, and its images can't be found; use "
                "model.gradient_checkpointing_enable(), which is not re-entrant"
            )
        return running


def _rotary(kwargs: dict[str, Any]) -> Tensor | None:
    embeddings = kwargs.get("position_embeddings")
    return embeddings[0] if isinstance(embeddings, tuple) else embeddings


def refuse_injected_cache(cache: Any, length: int) -> None:
    """Refuse a cache that holds injected visual tokens: it answers the question it was made for, and no other.

    Raises:
        NotImplementedError: more than a decode step is about to reuse it.
    """
    if length > 1 and getattr(cache, _CACHE_MARK, False):
        raise NotImplementedError(
            f"hia: past_key_values must be empty when a new question is asked, got a cache whose image tokens were "
            f"conditioned on an earlier instruction, and {length} new tokens; start without past_key_values and give "
            f"the whole conversation, with features=model.encode_images(...) so that no image is encoded twice"
        )


def refuse_chunked_prefill(prompt: int, chunk: int) -> None:
    """Raise NotImplementedError: visual tokens would be conditioned on an instruction not yet seen."""
    raise NotImplementedError(
        f"hia: the prompt must reach the decoder layers in one piece of {prompt} tokens, got a first piece of {chunk}; "
        f"chunked prefill would condition visual tokens on an instruction not yet seen: set prefill_chunk_size to None"
    )


def refuse_filled_cache(cache: Any) -> None:
    """Refuse a filled cache where images are given: they go with a whole prompt.

    Raises:
        NotImplementedError: the cache already holds tokens.
    """
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise NotImplementedError(
            f"hia: past_key_values must be empty when images are given, got a cache of {int(cache.get_seq_length())} "
            f"tokens; give the whole conversation in one prompt, with features=model.encode_images(...) so that no "
            f"image is encoded twice"
        )
