"""One layer of the adapter, step by step: ours, and the port of the released code with the same weights.

Both classes have a method per composite, which takes the inputs of :func:`bench.workloads.make_inputs` by name:

- ``encode(images, windows)``: pixels to features.
- ``extract(maps, hidden, layout)``: features and the instruction's token to what it asks for.
- ``inject(hidden, layout, extracted)``: the visual rows of the hidden states, rewritten.
- ``adapter_layer(images, windows, hidden, layout)``: a first question at one decoder layer, encoding included.
- ``second_question(maps, hidden, layout)``: the same layer for a later question, the features cached.
- ``adapter_train_step``: ``adapter_layer``, differentiated in every parameter and in ``hidden``.
- ``encode_train_step``: ``encode``, differentiated in every parameter; images of one size together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hia
from hia.layers.adapter import HiAAdapter
from hia.layers.features import ImageFeatures, LayerCache, PackedFeatures
from hia.layers.layout import CallLayout
from hia.layers.plan import AUTO, Form, choose, extract_forms, inject_forms

from ..workloads import ImageCase, Inputs, LayerCase, composite_entry
from .released import MEAN, STD, ReleasedHiA, ReleasedInjection

Outputs = tuple[Tensor, ...]
TEXTBOOK = "direct/direct"


def layer_case(case: ImageCase | LayerCase) -> LayerCase:
    """Return the case itself; of an image case a smallest layer beside its encoder, without positions."""
    if isinstance(case, LayerCase):
        return case
    smallest: dict[str, Any] = {"num_queries": 1, "width": case.width, "encoder": case.encoder, "position": "none"}
    return LayerCase("encoder", "tiny", "paper", (((64, 64),),), **smallest)


class HiAStep(nn.Module):
    """The adapter with one layer.

    Args:
        case: its shapes.
        plan: forms of the maths, as ``HiAAdapter.set_plan`` takes them.
    """

    def __init__(self, case: ImageCase | LayerCase, plan: str = AUTO) -> None:
        super().__init__()
        self.case = layer_case(case)
        self.adapter = HiAAdapter(self.case.config)
        self.adapter.set_plan(plan)
        self.layer = self.case.config.layer_indices[0]
        self.caches: tuple[dict[int, LayerCache], ...] = ()

    @torch.no_grad()
    def prepare(self, op: str, inputs: Inputs) -> None:
        """Do what is done once before the first question; before a second one also what ``encode_images`` keeps."""
        self.adapter.fold_weights()
        if op == "second_question":
            alone = [ImageFeatures((features,)).packed() for features in inputs["maps"]]
            self.caches = tuple(self.adapter.layer_caches(image, AUTO) for image in alone)

    @property
    def kept_bytes(self) -> int:
        """Count the bytes kept of the images beside their features."""
        return sum(cache.tokens.nbytes for caches in self.caches for cache in caches.values())

    def forms(self, op: str, inputs: Inputs, *, gradients: bool) -> dict[str, dict[str, Form]]:
        """Return for each part of a composite the form the plan chooses here, and the textbook's, as "textbook".

        Args:
            op: the composite.
            inputs: of the call.
            gradients: whether it records them.
        """
        layer, found = self.adapter.layer(self.layer), {}
        for part in composite_entry(op).parts:
            with torch.set_grad_enabled(gradients):
                if part == "extract":
                    batch = inputs["layout"].instruction_rows.shape[0]
                    sizes = layer.extractor.sizes(self._features(inputs), batch)
                    forms, forced = extract_forms(sizes), layer.extractor.form
                else:
                    sizes = layer.injection.sizes(inputs["layout"], inputs["hidden"])
                    forms, forced = inject_forms(sizes), layer.injection.form
            named = {form.name: form for form in forms}
            chosen = choose(part, forced, sizes, inputs["hidden"].device.type)
            found[part] = {"chosen": named[chosen], "textbook": named["direct"]}
        return found

    def _features(self, inputs: Inputs) -> PackedFeatures:
        """Return the call's features, or their shapes where they are yet to be encoded."""
        if "maps" in inputs:
            return ImageFeatures(inputs["maps"], self.caches).packed()
        lengths = tuple(self.case.feature_lengths)
        tokens = inputs["hidden"].new_empty(sum(lengths), self.case.channels, device="meta")
        return PackedFeatures(tokens, tokens, max(lengths), lengths)

    def encode(self, images: Sequence[Tensor], windows: Tensor) -> Outputs:
        """Encode: one [H', W', C] per image."""
        return tuple(self.adapter.encoder.forward_many(images, windows))

    def extract(self, maps: Outputs, hidden: Tensor, layout: CallLayout) -> Outputs:
        """Extract: ([n * M, D],)."""
        extractor = self.adapter.layer(self.layer).extractor
        rows = hidden.flatten(0, 1)
        return (extractor(rows, layout.instruction_rows, ImageFeatures(maps).packed(), layout.image_to_sample),)

    def inject(self, hidden: Tensor, layout: CallLayout, extracted: Tensor) -> Outputs:
        """Inject: ([B, S, D1],), in place where no gradient is recorded."""
        injection, rows = self.adapter.layer(self.layer).injection, hidden.flatten(0, 1)
        return (injection(rows, layout, extracted).view(hidden.shape),)

    def second_question(self, maps: Outputs, hidden: Tensor, layout: CallLayout) -> Outputs:
        """Answer a later question: ([B, S, D1],)."""
        return (self.adapter.layer(self.layer)(hidden, ImageFeatures(maps, self.caches).packed(), layout),)

    def adapter_layer(self, images: Sequence[Tensor], windows: Tensor, hidden: Tensor, layout: CallLayout) -> Outputs:
        """Answer a first question, encoding included: ([B, S, D1],)."""
        return self.second_question(self.encode(images, windows), hidden, layout)

    adapter_train_step = adapter_layer
    encode_train_step = encode

    def canonical(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name gradients by the names both classes share."""
        return {name.removeprefix("adapter."): gradient for name, gradient in gradients.items()}


class Unweighted(nn.Module):
    """``nn.MultiheadAttention`` without its weights, so that it may take SDPA."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        """Return what it does, and no weights."""
        return self.attention(query, key, value, need_weights=False)


class ReleasedStep(nn.Module):
    """The released maths, images one after the other.

    Args:
        case: of the "released" preset; any image case.
        sdpa: leave the attention weights out, which the released code asks for.
    """

    def __init__(self, case: ImageCase | LayerCase, *, sdpa: bool = False) -> None:
        super().__init__()
        self.case = layer_case(case)
        config, hidden_size = self.case.config, self.case.hidden_size
        self.port = ReleasedHiA(hidden_size, config.num_hidden_layers, 1, encoder_width=case.width)
        if isinstance(case, ImageCase):
            self.port.gate_Con = nn.ModuleDict()  # the encoder alone
            return
        (index,) = self.port.gate_Con
        layer = ReleasedInjection(hidden_size, config.num_heads, config.num_queries)
        if sdpa:
            layer.hr_cross_attn = Unweighted(layer.hr_cross_attn)
            layer.injection_cross_attn = Unweighted(layer.injection_cross_attn)
        self.port.gate_Con[index] = layer

    @property
    def layer(self) -> ReleasedInjection:
        """Return the one decoder layer's module."""
        return next(iter(self.port.gate_Con.values()))

    @staticmethod
    def normalised(images: Sequence[Tensor], windows: Tensor) -> list[Tensor]:
        """Return [1, 3, H, W] each: what its image processor hands over, made before anything is timed."""
        mean, std = (torch.tensor(value, device=images[0].device).view(3, 1, 1) for value in (MEAN, STD))
        return [
            ((image.permute(2, 0, 1).float() / top - mean) / std)[None]
            for image, (_, top) in zip(images, windows, strict=True)
        ]

    def encode(self, images: Sequence[Tensor], windows: Tensor) -> Outputs:
        """Encode: one [H', W', C] per image, ``images`` being :meth:`normalised`; a view of its [1, N, C]."""
        found = []
        for image in images:
            rows = -(-image.shape[2] // 32)
            found.append(self.port.spm.stem(image)[0].unflatten(0, (rows, -1)))
        return tuple(found)

    def _samples(self, maps: Outputs) -> list[tuple[int, slice, Tensor]]:
        """List (sample, rows of its tokens, [1, N, C]) of each image."""
        found, image = [], 0
        for sample, images in enumerate(self.case.samples):
            for position in range(len(images)):
                start = 1 + position * self.case.visual_tokens
                rows = slice(start, start + self.case.visual_tokens)
                found.append((sample, rows, maps[image].flatten(0, 1)[None]))
                image += 1
        return found

    def _instruction(self, hidden: Tensor, sample: int) -> Tensor:
        at = len(self.case.samples[sample]) * self.case.visual_tokens + self.case.text_tokens - 1
        return hidden[sample : sample + 1, at : at + 1]

    def extract(self, maps: Outputs, hidden: Tensor, layout: CallLayout) -> Outputs:
        """Extract: ([n * M, D],)."""
        layer, found = self.layer, []
        for sample, _, features in self._samples(maps):
            features = layer.hr_linear(self.port.condition_linear(features))
            queries = layer.hr_query_tokens + layer.semantic_linear(self._instruction(hidden, sample))
            query, key, value = layer.query_norm(queries), layer.feat_norm(features), layer.feat_norm(features)
            found.append(layer.hr_cross_attn(query, key, value)[0][0])
        return (torch.cat(found),)

    def inject(self, hidden: Tensor, layout: CallLayout, extracted: Tensor) -> Outputs:
        """Inject: ([B, S, D1],)."""
        layer, updates = self.layer, []
        parts = extracted.unflatten(0, (self.case.images, 1, -1))  # [n, 1, M, D]
        for sample, rows, part in self._samples(tuple(parts)):
            visual = hidden[sample : sample + 1, rows]
            query, key, value = layer.query_norm2(visual), layer.feat_norm2(part), layer.feat_norm2(part)
            updates.append(layer.ffn_norm(visual + layer.injection_cross_attn(query, key, value)[0]))
        return (self._concatenated(hidden, updates),)

    def _concatenated(self, hidden: Tensor, updates: list[Tensor]) -> Tensor:
        """Concatenate the whole sequence again for every image, as there."""
        tokens, samples, image = self.case.visual_tokens, [], 0
        for sample, images in enumerate(self.case.samples):
            one = hidden[sample : sample + 1]
            for position in range(len(images)):
                start = 1 + position * tokens
                one = torch.cat([one[:, :start], updates[image], one[:, start + tokens :]], dim=1)
                image += 1
            samples.append(one)
        return torch.cat(samples) if len(samples) > 1 else samples[0]

    def second_question(self, maps: Outputs, hidden: Tensor, layout: CallLayout) -> Outputs:
        """Answer a later question: ([B, S, D1],)."""
        updates = []
        for sample, rows, features in self._samples(maps):
            features = self.port.condition_linear(features)
            visual = hidden[sample : sample + 1, rows]
            updates.append(self.layer(visual, self._instruction(hidden, sample), features))
        return (self._concatenated(hidden, updates),)

    def adapter_layer(self, images: Sequence[Tensor], windows: Tensor, hidden: Tensor, layout: CallLayout) -> Outputs:
        """Answer a first question, encoding included: ([B, S, D1],)."""
        return self.second_question(self.encode(images, windows), hidden, layout)

    adapter_train_step = adapter_layer

    def encode_train_step(self, images: Sequence[Tensor], windows: Tensor) -> Outputs:
        """Encode as :meth:`encode`, images of one size as one batch: what plain PyTorch trains fastest with."""
        found: dict[int, Tensor] = {}
        for size in dict.fromkeys(image.shape for image in images):
            group = [index for index, image in enumerate(images) if image.shape == size]
            maps = self.port.spm.stem(torch.cat([images[index] for index in group]))
            found.update(zip(group, maps.unflatten(1, (-(-size[2] // 32), -1)), strict=True))
        return tuple(found[index] for index in range(len(images)))

    def canonical(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name gradients by ours, packed projections split, without the convolutions' biases where ours has none."""
        with torch.device("meta"):
            ours = {name.removeprefix("adapter.") for name, _ in HiAStep(self.case).named_parameters()}
        named = {name.removeprefix("port.").replace("attn.attention.", "attn."): g for name, g in gradients.items()}
        hidden = {"hidden": gradients["hidden"]} if "hidden" in gradients else {}
        return {name: g for name, g in hia.convert_released(named).items() if name in ours} | hidden


def make_weights(case: ImageCase | LayerCase, dtype: torch.dtype, device: str, seed: int = 1) -> dict[str, Tensor]:
    """Draw random weights of a :class:`ReleasedStep` or :class:`HiAStep`, whichever the preset has, by our names.

    Every tensor counts: nothing is zero that would hide a difference. Matrices keep the size of what passes; the
    last norm of a bottleneck is small, or sixteen blocks would double the variance sixteen times.
    """
    with torch.device("meta"):
        step = HiAStep(case)
    generator = torch.Generator(device).manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, meta in step.state_dict().items():
        if not meta.is_floating_point():
            weights[name] = torch.zeros(meta.shape, dtype=meta.dtype, device=device)
            continue
        values = torch.randn(meta.shape, generator=generator, device=device, dtype=torch.float32)
        weights[name] = _shaped(name, values).to(dtype)
    return weights


def used_weights(op: str, weights: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return those that the composite reads; none for an op."""
    parts = {
        "encode": ("encoder.",),
        "encode_train_step": ("encoder.",),
        "extract": (".extractor.", "adapter.feature_projection."),
        "inject": (".injection.",),
        "second_question": (".extractor.", ".injection.", "adapter.feature_projection."),
    }.get(op, ("",))
    return {name: tensor for name, tensor in (weights or {}).items() if any(part in name for part in parts)}


def _shaped(name: str, values: Tensor) -> Tensor:
    if "running_var" in name:
        return values.mul_(0.1).add_(1).clamp_(min=0.5)
    if name.endswith("bn3.weight"):
        return values.mul_(0.05).add_(0.3)
    if name.endswith("weight") and values.dim() == 1:
        return values.mul_(0.1).add_(1)
    if values.dim() > 1 and not name.endswith("queries"):
        fan_in = values[0].numel()
        return values.mul_((2 / fan_in) ** 0.5 if values.dim() == 4 else fan_in**-0.5)
    return values.mul_(0.1)


def our_step(case: ImageCase | LayerCase, weights: dict[str, Tensor], plan: str = AUTO) -> HiAStep:
    """Build ours with these weights, in their dtype and on their device, in eval mode; parameters want gradients."""
    with torch.device("meta"):
        step = HiAStep(case, plan)
    step.load_state_dict(weights, assign=True)
    return step.eval()


def released_step(case: ImageCase | LayerCase, weights: dict[str, Tensor], *, sdpa: bool = False) -> ReleasedStep:
    """Build the port with our weights under its names; what ours lacks (the convolutions' biases) is zero."""
    with torch.device("meta"):
        step = ReleasedStep(case, sdpa=sdpa)
    ours = {name.removeprefix("adapter."): tensor for name, tensor in weights.items()}
    theirs: dict[str, Tensor] = {}
    for name, meta in step.state_dict().items():
        plain = name.removeprefix("port.").replace("attn.attention.", "attn.")
        theirs[name] = _find(plain, meta, ours)
    step.load_state_dict(theirs, assign=True)
    return step.eval()


def _find(name: str, meta: Tensor, ours: dict[str, Tensor]) -> Tensor:
    """Find the tensor of this name there, out of ours."""
    (parts,) = [hia.convert_released({name: meta})]
    some = next(iter(ours.values()))
    if not parts or not any(part in ours for part in parts):
        return torch.zeros(
            meta.shape, dtype=meta.dtype if not meta.is_floating_point() else some.dtype, device=some.device
        )
    return torch.cat([ours[part] for part in parts]).reshape(meta.shape) if len(parts) > 1 else ours[next(iter(parts))]


def arguments_of(step: HiAStep | ReleasedStep, op: str, inputs: Inputs) -> dict[str, Any]:
    """Return the inputs in the form that ``step`` takes them."""
    if isinstance(step, ReleasedStep) and "images" in inputs:
        dtype = step.port.spm.stem.conv1.weight.dtype
        images = step.normalised(inputs["images"], inputs["windows"])
        return {**inputs, "images": [image.to(dtype) for image in images]}
    return dict(inputs)
