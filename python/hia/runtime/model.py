"""A frozen host with the adapter attached."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import HiAConfig, host_facts
from ..encoder.calibration import calibrate, chunks_of, pixels_and_windows
from ..encoder.memory import Budget, budget_of
from ..hosts import LlamaHost, find_host
from ..images.load import check_pixels, windows_of
from ..images.radiograph import Radiograph
from ..layers.adapter import HiAAdapter
from ..layers.features import ImageFeatures
from ..layers.forms import AUTO
from ..layers.layout import VisualLayout
from . import checkpoint, health, resolution
from .attachment import adapter_for, is_tuned, own_parameters
from .context import PromptContext, layout_of, pad_left
from .hooks import InjectionHooks, refuse_chunked_prefill, refuse_filled_cache
from .options import RunOptions
from .trainer import (
    ENCODER_LR_SCALE,
    lost_checkpointing,
    parameter_groups,
    refuse_reentrant_checkpointing,
    set_host_mode,
    warn_if_pristine,
)

KEEPS = ("auto", "features", "folded", "kv")


def get_hia_model(
    base: nn.Module,
    config: HiAConfig,
    *,
    plan: str = AUTO,
    high_resolution: bool = True,
    batch_norm: str = "running",
    auto_fold: bool = True,
) -> HiAModel:
    """Attach a new adapter to a host and freeze the host; parameters of PEFT adapters in it stay as they are.

    Args:
        base: ``LlavaForConditionalGeneration``, ``LlamaForCausalLM``, or a PEFT model of one of them.
        config: a preset made for this host, e.g. ``HiAConfig.paper(base)``.
        plan: see :meth:`HiAModel.set_plan`. This and the next three are choices of a run: no checkpoint holds them, and
            they can be changed at any time.
        high_resolution: see :meth:`HiAModel.set_high_resolution`.
        batch_norm: see :meth:`HiAModel.set_batch_norm`.
        auto_fold: see :meth:`HiAModel.set_auto_fold`.

    Returns:
        The model: forward and generate take the base model's arguments and those of :meth:`HiAModel.forward`.

    Raises:
        TypeError: a host the runtime does not know. ValueError: the config is for another host, or a choice that
            there isn't.
    """
    return HiAModel(
        base, config, plan=plan, high_resolution=high_resolution, batch_norm=batch_norm, auto_fold=auto_fold
    )


class HiAModel(RunOptions, nn.Module):
    """Made by :func:`get_hia_model`. The host keeps its parameters and its state_dict keys; hooks do the rest.

    One prompt at a time: like transformers' models, not for concurrent calls from several threads.
    """

    base_model: nn.Module
    adapter: HiAAdapter

    def __init__(
        self,
        base: nn.Module,
        config: HiAConfig,
        *,
        plan: str = AUTO,
        high_resolution: bool = True,
        batch_norm: str = "running",
        auto_fold: bool = True,
    ):
        super().__init__()
        if isinstance(base, HiAModel):
            raise TypeError("hia.get_hia_model: base must not have an adapter yet, got a HiAModel; call unload() first")
        host = find_host(base)
        facts = host_facts(host.model)
        for name, value in facts.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"hia.get_hia_model: config must be made for this host ({name}={value!r}), got "
                    f"{name}={getattr(config, name)!r}; use a preset, e.g. HiAConfig.paper(base)"
                )
        self.hia_config = config
        self._host: tuple[LlamaHost] = (host,)  # in a tuple, or the host's modules would be registered twice
        self.adapter = adapter_for(host, config)
        self.set_plan(plan).set_high_resolution(high_resolution).set_batch_norm(batch_norm).set_auto_fold(auto_fold)
        self.base_model = base
        self._modes = [(module, module.training) for module in base.modules()]
        self._tuned = is_tuned(base)
        self._frozen = [parameter for parameter in own_parameters(base) if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._hooks: InjectionHooks | None = InjectionHooks(host, self.adapter)
        self._enabled = True
        self._set_mode(base.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not set yet: asking it for the attribute would never end
                raise
            return getattr(self.base_model, name)

    def forward(
        self,
        *args: Any,
        high_res_pixels: Sequence[Tensor] | None = None,
        windows: Tensor | None = None,
        features: ImageFeatures | None = None,
        image_map: Tensor | None = None,
        instruction_index: Tensor | None = None,
        max_activation_bytes: int | str | None = AUTO,
        **kwargs: Any,
    ) -> Any:
        """Run the base model, with the images' details injected where visual tokens stand.

        Args:
            args: the base model's.
            high_res_pixels: one [H, W, 1 or 3] uint8, uint16 or float tensor per image of the batch, in order of
                their placeholders.
            windows: [n, 2] fp32, (low, high) in units of the pixels; None takes :func:`hia.images.load.default_window`.
            features: of :meth:`encode_images`, instead of ``high_res_pixels``.
            image_map: [B, S] int64, the image's number where a visual token stands, -1 elsewhere. LLaVA's can be
                read off ``input_ids``; for LLaMA it is required.
            instruction_index: [B] int64, position of the last token of the *instruction* (in training: before the
                answer). Required with images; never assumed to be the last token.
            max_activation_bytes: see :meth:`encode_images`.
            kwargs: the base model's.

        Returns:
            The base model's output.

        Raises:
            ValueError, TypeError: inputs that don't fit. NotImplementedError: a filled cache, a chunked prompt.
        """
        inputs = (high_res_pixels, windows, features, image_map, instruction_index, max_activation_bytes)
        prompt = self._open_prompt(inputs, args, kwargs, generating=False)
        return self._during(prompt, self.base_model, args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base model's ``generate``, with :meth:`forward`'s arguments too. Injection happens in prefill only.

        Prompts padded on the right are padded on the left instead, before and in the result: decoding continues at
        the last column, which would be padding.
        """
        mask = kwargs.get("attention_mask")
        if self._enabled and self._hooks is not None:
            mask = pad_left(kwargs)
        names = ("high_res_pixels", "windows", "features", "image_map", "instruction_index")
        budget = kwargs.pop("max_activation_bytes", AUTO)
        inputs = (*(kwargs.pop(name, None) for name in names), budget)
        with torch.no_grad():
            prompt = self._open_prompt(inputs, args, {**kwargs, "attention_mask": mask}, generating=True)
            settings = kwargs.get("generation_config") or getattr(self.base_model, "generation_config", None)
            chunk = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
            if prompt is not None and chunk is not None:
                refuse_chunked_prefill(prompt.layout.seq_len, chunk)  # some hosts would fail first, and obscurely
            return self._during(prompt, self.base_model.generate, args, kwargs)

    def encode_images(
        self,
        high_res_pixels: Sequence[Tensor],
        windows: Tensor | None = None,
        keep: str = "auto",
        max_activation_bytes: int | str | None = AUTO,
    ) -> ImageFeatures:
        """Encode images once, to ask many questions: pass the result as ``features``.

        Args:
            high_res_pixels: one [H, W, 1 or 3] tensor per image.
            windows: [n, 2] fp32, or None.
            keep: what is kept of each image beside its features, for every layer: "kv", its keys and values;
                "folded", its projected and normed features; "features", nothing; "auto" (default), keys and values
                where that makes a question cheaper and takes at most 1 GiB an image and layer. Nothing is kept while
                gradients are recorded. ``result.nbytes`` counts it all.
            max_activation_bytes: what the encoder's activations may take; larger images go through it in strips, with
                the same result. "auto" (default): what the host's prefill takes anyway, for images above 2^22 pixels
                (docs/encoder.md, "Strips"). An int: for inference. None: no limit.

        Returns:
            One [ceil(H / stride), ceil(W / stride), C] map per image, and what is kept.

        Raises:
            ValueError, TypeError: pixels or windows that don't fit, or no such ``keep`` or ``max_activation_bytes``.
        """
        if keep not in KEEPS:
            raise ValueError(f"hia: keep must be {' or '.join(map(repr, KEEPS))}, got {keep!r}")
        if torch.is_grad_enabled() and keep not in ("auto", "features"):
            raise ValueError(
                f"hia: keep must be 'auto' or 'features' while gradients are recorded, got {keep!r}; "
                f"use torch.no_grad()"
            )
        tokens = len(high_res_pixels) * self._host[0].image_tokens
        features = self._encoded(high_res_pixels, windows, self._budget(max_activation_bytes, tokens))
        if keep == "features" or torch.is_grad_enabled() or not len(features):
            return features
        alone = [features.select([image]).packed() for image in range(len(features))]
        self.adapter.fold_by_itself(alone[0], 1)
        return ImageFeatures(features.maps, tuple(self.adapter.layer_caches(image, keep) for image in alone))

    def _encoded(
        self, high_res_pixels: Sequence[Tensor], windows: Tensor | None, budget: Budget = None
    ) -> ImageFeatures:
        encoder = self.adapter.encoder
        seen = resolution.limited(self._high_resolution, self._host[0], high_res_pixels)
        for number, pixels in enumerate(seen):
            check_pixels(f"high_res_pixels[{number}]", pixels, encoder.smallest_side)
        windows = windows_of(high_res_pixels, windows).float()
        return ImageFeatures(tuple(encoder.forward_many(seen, windows, budget)))

    def _budget(self, max_activation_bytes: int | str | None, tokens: int, cached: bool = True) -> Budget:
        """Take "auto" for what the host's prefill of so many tokens takes, with a KV cache or without."""
        itemsize = self.adapter.encoder.conv1.weight.element_size()
        return budget_of(max_activation_bytes, self._host[0].prefill_bytes(tokens, itemsize, cached))

    def adapter_health(self, batch: Mapping[str, Any]) -> health.AdapterHealth:
        """Measure on one batch whether the adapter can learn, and what it does.

        One forward; with labels one backward too. Parameters, their ``.grad``, statistics, mode and random states
        stay as they are. Numbers are made in plain fp32 (fp64 for fp64 hosts), whatever form of the maths ran.

        Args:
            batch: :meth:`forward`'s arguments with images, e.g. of :class:`hia.HiAProcessor`.

        Returns:
            The numbers; ``str()`` is a table, ``.problems()`` what they say, ``.to_dict()`` for a log.

        Raises:
            ValueError: no images, or the adapter is disabled or unloaded; and what :meth:`forward` raises.
        """
        if self._hooks is None or not self._enabled:
            state = "unloaded" if self._hooks is None else "disabled"
            raise ValueError(f"hia: adapter_health must have an adapter that is attached and enabled, got one {state}")
        return health.adapter_health(self, self.adapter, batch)

    def _during(
        self, prompt: PromptContext | None, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._hooks is None:
            return function(*args, **kwargs)
        self._hooks.prompt = prompt
        try:
            return function(*args, **kwargs)
        finally:
            self._hooks.prompt = self._hooks.running = None

    def _open_prompt(
        self, inputs: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any], generating: bool
    ) -> PromptContext | None:
        pixels, windows, features, image_map, instruction_index, max_activation_bytes = inputs
        if not self._enabled or self._hooks is None:
            return None
        budget_of(max_activation_bytes)
        if pixels is not None and features is not None:
            raise ValueError("hia: high_res_pixels must not be given with features, got both")
        images = len(features if features is not None else pixels if pixels is not None else ())
        if images == 0:
            if image_map is not None and bool((image_map >= 0).any()):
                raise ValueError("hia: high_res_pixels or features must come with image_map, got neither")
            return None
        if self.training and torch.is_grad_enabled() and lost_checkpointing(self._host[0].layers):
            set_host_mode(self.base_model, True)  # enabled on the host itself, since train()
        layout = self._layout(images, image_map, instruction_index, args, kwargs)
        if features is None:
            cached = kwargs.get("use_cache") is not False
            budget = self._budget(max_activation_bytes, layout.batch * layout.seq_len, cached)
            features = self._encoded(pixels, windows, budget)
        else:
            resolution.check_features(self._high_resolution, self._host[0], self.adapter.encoder, features)
        packed = self.adapter.packed(features)
        self.adapter.fold_by_itself(packed, layout.samples.shape[0])
        shared = self.adapter.feature_projection
        if shared is not None and torch.is_grad_enabled():
            samples = layout.samples.shape[0]
            if any(layer.extractor.reads_shared(packed, samples) for layer in self.adapter.layers.values()):
                # before the layers: one that is run again by gradient checkpointing must record what it did at first
                packed.shared(shared)
        return PromptContext(packed, layout, generating)

    @torch.compiler.disable  # reads the maps' values
    def _layout(
        self,
        images: int,
        image_map: Tensor | None,
        instruction_index: Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> VisualLayout:
        refuse_filled_cache(kwargs.get("past_key_values"))
        refuse_reentrant_checkpointing(self._host[0], self.training)
        return layout_of(self._host[0], images, image_map, instruction_index, args, kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Enable it as the base model does, not re-entrant unless told so: a frozen host's inputs need no gradient."""
        self.base_model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}, **kwargs
        )
        self._set_mode(self.training)  # the host's layers need their flag again

    def train(self, mode: bool = True) -> HiAModel:
        """Set the adapter to training or evaluation. A frozen host stays in evaluation, without dropout.

        What is trained in the host follows: PEFT's layers, and modules all of whose parameters require gradients.
        Warns where training would use batch-norm statistics that no data has touched.

        Returns:
            The model itself.
        """
        if mode:
            warn_if_pristine(self.adapter)
        self._set_mode(mode)
        return self

    def _set_mode(self, mode: bool) -> None:
        self.training = mode
        self.adapter.train(mode)
        set_host_mode(self.base_model, mode)

    def calibrate_encoder(self, images: Sequence[Tensor | Radiograph], windows: Tensor | None = None) -> HiAModel:
        """Measure the encoder's batch-norm statistics over images, once before training a new encoder.

        Images of one size go through together, up to 2^20 pixels; statistics are the moments of all images' pixels. A
        few dozen images of the data serve. Weights that came with statistics of their own don't need it.

        Args:
            images: of :func:`hia.load_image`, which bring their windows; or one [H, W, 1 or 3] tensor each, as
                ``high_res_pixels``.
            windows: [n, 2] fp32, of tensors: those that training uses, e.g. a batch's, or the statistics are other
                images'. None takes :func:`hia.images.load.default_window`.

        Returns:
            The model itself.

        Raises:
            ValueError, TypeError: no images, pixels or windows that don't fit, a size that gives one feature in all,
                activations that overflow. Nothing is set then.
        """
        pixels, windows = pixels_and_windows(images, windows, self.adapter.encoder.smallest_side)
        seen = resolution.limited(self._high_resolution, self._host[0], pixels)
        chunks = chunks_of(self.adapter.encoder, seen)
        calibrate(
            self.adapter.encoder, [partial(self._encoded, [seen[i] for i in chunk], windows[chunk]) for chunk in chunks]
        )
        return self

    def parameter_groups(
        self, lr: float, *, encoder_lr_scale: float = ENCODER_LR_SCALE, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Group the trained parameters for an optimizer, e.g. ``torch.optim.AdamW(model.parameter_groups(1e-4))``.

        Args:
            lr: of the adapter's layers, and of what is trained in the host (LoRA).
            encoder_lr_scale: the encoder's rate is this times ``lr``.
            weight_decay: of matrices and convolutions; norms, biases, gates and the learnable queries have none.

        Returns:
            Dicts with ``name`` ("encoder", "adapter", "host", each also "..._no_decay"), ``params``, ``lr`` and
            ``weight_decay``; every trained parameter once, empty groups left out.

        Raises:
            ValueError: a rate that is negative or not finite.
        """
        return parameter_groups(self.adapter, self.base_model, lr, encoder_lr_scale, weight_decay)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Count the parameters: (trainable, all), the host's included."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Write the counts to standard output, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        sys.stdout.write(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}\n")

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Make the model the host inside the block: images given for the adapter are ignored."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def unload(self) -> nn.Module:
        """Take the adapter off; the host is as it was before, bit for bit.

        Returns:
            The base model.
        """
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
            if self._tuned or not is_tuned(self.base_model):  # PEFT, put in since, wants the host frozen
                for parameter in self._frozen:
                    parameter.requires_grad_(True)
            for module, training in self._modes:
                module.training = training
        return self.base_model

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write adapter_config.json, adapter_model.safetensors and README.md: the adapter alone.

        Raises:
            NotADirectoryError: the path is a file.
        """
        name = getattr(getattr(self._host[0].model, "config", None), "_name_or_path", "") or ""
        checkpoint.save_adapter(self.adapter, name, Path(save_directory))

    @classmethod
    def from_pretrained(cls, base: nn.Module, directory: str | Path, **options: Any) -> HiAModel:
        """Attach a saved adapter.

        Args:
            base: the host it was made for.
            directory: of the three files that :meth:`save_pretrained` writes.
            options: ``plan``, ``high_resolution``, ``batch_norm``, ``auto_fold`` of :func:`get_hia_model`. What isn't
                given takes its default; or, with a warning, what a file of an older version holds.

        Raises:
            FileNotFoundError: a file is missing. ValueError: the adapter was made for another host, or its file
                has missing, extra or wrong-shaped tensors, or is damaged.
        """
        config, held = checkpoint.read_config(Path(directory))
        checkpoint.check_host(config, host_facts(find_host(base).model), Path(directory))
        tensors = checkpoint.read_tensors(Path(directory))
        followed = checkpoint.followed_options(held, options, Path(directory))
        model = cls(base, config, **followed, **options)
        try:
            checkpoint.load_adapter(model.adapter, tensors, Path(directory))
        except BaseException:
            model.unload()
            raise
        return model
