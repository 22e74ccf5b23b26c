"""Measure on a batch whether an adapter can learn and what it does, in direct maths beside the forms that ran."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import direct
from ..layers.adapter import HiAAdapter, HiALayer
from ..layers.extractor import Extractor
from ..layers.features import ImageFeatures, PackedFeatures
from ..layers.layout import CallLayout
from ..unit import Unit

# Scores of standard deviation s leave log N - s^2 / 2 of the entropy: s = 0.37 here for 784 features, and what a query
# reads is the image's mean. Scores of unit variance, a healthy start, leave 0.92; PyTorch's default start 0.998.
UNIFORM_EXTRACTION = 0.99
# Extracted tokens are means of the same features and much alike, so a healthy start has 0.99 here. This is s = 0.1 for
# 256 tokens; PyTorch's default start has 1.000000.
UNIFORM_INJECTION = 0.999
# Here nearly all of the weight is on one token in every head: the softmax is flat, and passes no gradient on.
ONE_HOT_ENTROPY = 0.01
# Vectors this alike are 0.045 of their length apart, and scores made from them differ by as little. 0.93 is a healthy
# start of Z̄, 0.4 of the encoder's features; PyTorch's default start has 0.999998 of Z̄.
SAME_COSINE = 0.999
# Updates this alike are 0.0045 of their length apart: bf16 rounds that away (2^-8).
SAME_UPDATE_COSINE = 0.99999
# LayerNorm follows the sum: queries whose own part is below a tenth of what they share are one query.
DROWNING_RATIO = 10.0
# Adam divides by |g| + 1e-8 (PyTorch's default): below that, steps shrink with the gradient.
ADAM_EPSILON = 1e-8

# What has a gradient while the update is zero: everything else has a zero for a factor.
OPEN_AT_ZERO = ("injection.out", "gate")
SHARED = ("encoder", "feature_projection")  # groups that all layers read
_NORM = "norms"
_GROUPS = {
    "extractor.queries": "queries",
    "extractor.condition": "condition",
    "extractor.feature_projection": "feature_projection",
    "extractor.q_proj": "extractor.q",
    "extractor.kv_proj": "extractor.kv",
    "extractor.out_proj": "extractor.out",
    "injection.q_proj": "injection.q",
    "injection.kv_proj": "injection.kv",
    "injection.out_proj": "injection.out",
    "injection.gate": "gate",
    "extractor.query_norm": _NORM,
    "extractor.feature_norm": _NORM,
    "injection.visual_norm": _NORM,
    "injection.extracted_norm": _NORM,
    "injection.post_norm": _NORM,
}


@dataclass(frozen=True)
class LayerHealth:
    """One HiA layer on one batch. All numbers are dimensionless; None where there is nothing to compare.

    Attributes:
        extraction_entropy: of the queries' attention to an image's N_i features, over log N_i: 1 is uniform. Mean over
            heads, queries and images of more than one feature.
        injection_entropy: of the visual tokens' attention to the M extracted tokens, over log M; likewise.
        query_cosine: between the extracted tokens Z̄ of an image, mean over its pairs, then over images.
        effective_rank: of an image's Z̄, from 1 to M: exp of the entropy of the squared singular values over their sum
            (Roy and Vetterli, "The effective rank", EUSIPCO 2007, who take the values unsquared). Mean over images.
        instruction_ratio: RMS of Linear(h_N) over RMS of the queries; None if not aware of the instruction.
        update_ratio: RMS of what is added to the visual rows (before the norm after the sum) over RMS of these rows.
        read_cosine: between what the visual tokens of an image read, before the output projection, which may be zero.
        update_cosine: between what is added to them; None while that is zero.
    """

    extraction_entropy: float | None
    injection_entropy: float | None
    query_cosine: float | None
    effective_rank: float | None
    instruction_ratio: float | None
    update_ratio: float
    read_cosine: float | None
    update_cosine: float | None

    def problems(self, rounding: float) -> Iterator[str]:
        """Say in a sentence each what keeps this layer from learning.

        Args:
            rounding: unit roundoff of the hidden states that are added to.
        """
        values = {name: value for name, value in vars(self).items() if value is not None}
        broken = sorted(name for name, value in values.items() if not math.isfinite(value))
        if broken:
            yield f"NaN or infinite: {', '.join(broken)}"
            return
        yield from self._attention_problems()
        if self.query_cosine is not None and self.query_cosine > SAME_COSINE:
            yield f"the queries' outputs are all the same (cosine {self.query_cosine:.6f}): they extract one token"
        if self.instruction_ratio is not None and self.instruction_ratio > DROWNING_RATIO:
            yield (
                f"the instruction drowns the queries ({self.instruction_ratio:.1f} times their size): behind the norm "
                f"they are one query"
            )
        if 0 < self.update_ratio < rounding:
            yield f"the update is {self.update_ratio:.1e} of the hidden states, below their rounding: it is lost"
        cosine = self.read_cosine if self.update_cosine is None else self.update_cosine
        if cosine is not None and cosine > SAME_UPDATE_COSINE:
            yield f"the update is the same on every visual token of an image (cosine {cosine:.6f}): nothing is placed"

    def _attention_problems(self) -> Iterator[str]:
        for name, value, limit, read in (
            ("extraction", self.extraction_entropy, UNIFORM_EXTRACTION, "every query reads the mean of the features"),
            ("injection", self.injection_entropy, UNIFORM_INJECTION, "every visual token reads the same mean"),
        ):
            if value is not None and value > limit:
                yield f"the {name}'s attention is uniform ({value:.6f} of the highest entropy): {read}"
            elif value is not None and value < ONE_HOT_ENTROPY:
                yield f"the {name}'s attention is one-hot ({value:.4f} of the highest entropy): it passes no gradient"


@dataclass(frozen=True)
class Gradient:
    """Gradient of a group of parameters.

    Attributes:
        norm: Euclidean, over all their elements.
        elements: how many.
    """

    norm: float
    elements: int

    @property
    def rms(self) -> float:
        """Return the root mean square of an element."""
        return self.norm / math.sqrt(self.elements)


@dataclass(frozen=True)
class AdapterHealth:
    """Result of :meth:`hia.HiAModel.adapter_health`: ``str()`` is a table, :meth:`problems` the verdict.

    Attributes:
        layers: by decoder layer.
        gradients: of the loss, by group: "encoder", "feature_projection" (released maths), and "<layer>.<part>" with
            parts queries, condition, feature_projection, extractor.q, .kv, .out, injection.q, .kv, .out, norms, gate.
            Frozen parameters are left out; empty without labels.
        loss: the batch's; None without labels.
        feature_cosine: between the encoder's features of an image, mean over its pairs, then over images.
        rounding: unit roundoff of the host's hidden states.
    """

    layers: dict[int, LayerHealth]
    gradients: dict[str, Gradient] = field(default_factory=dict)
    loss: float | None = None
    feature_cosine: float | None = None
    rounding: float = 0.0

    def problems(self) -> list[str]:
        """List in plain sentences what says that nothing, or something at most, can be learnt.

        The thresholds and their reasons are this module's constants.

        Returns:
            Sentences that name the layer or group; empty for a healthy adapter.
        """
        found = []
        if self.feature_cosine is not None and self.feature_cosine > SAME_COSINE:
            found.append(f"encoder: the features of an image are all the same (cosine {self.feature_cosine:.6f})")
        for index, layer in self.layers.items():
            found += [f"layer {index}: {problem}" for problem in layer.problems(self.rounding)]
        if self.loss is not None and not math.isfinite(self.loss):
            found.append(f"the loss is {self.loss}")
        return found + list(self._gradient_problems())

    def _gradient_problems(self) -> Iterator[str]:
        for index in self.layers:
            starts = [self.gradients[f"{index}.{part}"] for part in OPEN_AT_ZERO if f"{index}.{part}" in self.gradients]
            if not self._is_open(str(index)) and starts and max(start.rms for start in starts) < ADAM_EPSILON:
                yield f"layer {index}: the update is zero, and no gradient reaches what would open it"
        broken = [name for name, gradient in self.gradients.items() if not math.isfinite(gradient.norm)]
        if broken:
            yield f"the gradient is NaN or infinite of {', '.join(broken)}"
        small = [
            f"{name} ({gradient.rms:.1e})"
            for name, gradient in self.gradients.items()
            if gradient.rms < ADAM_EPSILON and self._is_open(name)
        ]
        if small:
            least = f"{ADAM_EPSILON:.0e}"
            yield f"the gradient's RMS is below Adam's epsilon {least}, so they hardly move: {', '.join(small)}"

    def _is_open(self, group: str) -> bool:
        """Tell whether a gradient can be expected: some update that the group is part of is not zero."""
        owner = group.partition(".")[0]
        return any(layer.update_ratio > 0 for index, layer in self.layers.items() if owner in (str(index), *SHARED))

    def to_dict(self) -> dict[str, float]:
        """Flatten for a trainer's log.

        Returns:
            Floats by name, e.g. "layers.13.update_ratio", "gradients.13.queries.rms", "loss"; what is None is left out.
        """
        whole = {"loss": self.loss, "feature_cosine": self.feature_cosine}
        flat = {name: value for name, value in whole.items() if value is not None}
        for index, layer in self.layers.items():
            flat.update({f"layers.{index}.{name}": value for name, value in vars(layer).items() if value is not None})
        for name, gradient in self.gradients.items():
            numbers = {"norm": gradient.norm, "elements": float(gradient.elements), "rms": gradient.rms}
            flat.update({f"gradients.{name}.{kind}": value for kind, value in numbers.items()})
        return flat

    def __str__(self) -> str:
        names = [entry.name for entry in dataclasses.fields(LayerHealth)]
        rows = [["", *(f"layer {index}" for index in self.layers)]]
        rows += [[name, *(_shown(getattr(layer, name)) for layer in self.layers.values())] for name in names]
        text = f"{table(rows)}\n\ncosine between the encoder's features: {_shown(self.feature_cosine)}"
        if self.gradients:
            rows = [["gradient of", "elements", "norm", "RMS"]]
            for name, gradient in self.gradients.items():
                rows.append([name, f"{gradient.elements:,d}", f"{gradient.norm:.2e}", f"{gradient.rms:.2e}"])
            text += f"\nloss: {self.loss:.4f}\n\n" + table(rows)
        problems = [f"- {problem}" for problem in self.problems()] or ["no problem found"]
        return "\n".join([text, "", *problems])


def table(rows: list[list[str]]) -> str:
    """Align columns of text: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.6f}" if 0.999 < value < 1.0001 else f"{value:.4f}"  # how near to 1 is what counts there


def adapter_health(model: nn.Module, adapter: HiAAdapter, batch: Mapping[str, Any]) -> AdapterHealth:
    """Run a batch and measure; see :meth:`hia.HiAModel.adapter_health`.

    Args:
        model: :class:`hia.HiAModel`, the adapter attached and enabled.
        adapter: the model's.
        batch: arguments of the model's forward, images among them.

    Raises:
        ValueError: no images.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"hia: batch must be a mapping, the model's arguments, got {type(batch).__name__}")
    if batch.get("high_res_pixels") is None and batch.get("features") is None:
        raise ValueError(f"hia: batch must hold images, got one with {sorted(batch)}")
    inputs = {"use_cache": False, **batch, "return_dict": True}
    graded = inputs.get("labels") is not None
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(graded))
        with _recorded(adapter) as (seen, parameters):
            output = model(**inputs)
        if not seen:
            raise ValueError(f"hia: batch must hold images, got one with {sorted(batch)}")
        loss = output.loss if graded else None
        gradients = {} if loss is None else _gradients(parameters, loss, batch.get("features"))
        with torch.no_grad():
            layers = {}
            for index in sorted(seen):
                layer = adapter.layer(index)
                layers[index] = layer.inside(_layer_health, layer, seen[index])
            first = next(iter(seen.values()))
            features = _mean(
                [
                    direct.mean_cosine(direct.exact(tokens))
                    for tokens in first.features.tokens.split(first.features.lengths)
                ]
            )
    rounding = torch.finfo(first.visual.dtype).eps / 2
    return AdapterHealth(layers, gradients, None if loss is None else float(loss.detach()), features, rounding)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Put random states and buffers (live batch-norm statistics) back as they were, whatever runs inside."""
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    if not torch.equal(buffer, value):  # any write would drop the folded weights
                        buffer.copy_(value)


@dataclass
class _Seen:
    """Inputs of one layer, and its extracted tokens."""

    instruction: Tensor  # [A, D1]
    features: PackedFeatures
    image_to_sample: Tensor  # [n]
    extracted: Tensor = field(init=False)  # [n * M, D]
    visual: Tensor = field(init=False)  # [R, D1], image by image
    rows: tuple[int, ...] = ()


@contextmanager
def _recorded(adapter: HiAAdapter) -> Iterator[tuple[dict[int, _Seen], dict[str, nn.Parameter]]]:
    """Keep each layer's inputs while inside, and the adapter's parameters by name.

    Inputs are copies: without gradients the injection writes over its own. Parameters are those that units compute
    with, which under sharding or offloading are others than those that units hold between calls.
    """
    seen: dict[int, _Seen] = {}
    handles: list[Any] = []
    parameters = dict(adapter.named_parameters())

    def note(name: str, unit: Unit) -> None:
        def enter(module: nn.Module, _args: Any) -> None:
            parameters.update(module.named_parameters(prefix=name))

        handles.append(unit.register_forward_pre_hook(enter))

    def watch(index: int, layer: HiALayer) -> None:
        @torch.no_grad()
        def enter(_module: nn.Module, args: tuple[Tensor, Tensor, PackedFeatures, Tensor]) -> None:
            hidden, rows, features, image_to_sample = args
            seen[index] = _Seen(hidden[rows], features, image_to_sample)

        @torch.no_grad()
        def inject(_module: nn.Module, args: tuple[Tensor, CallLayout, Tensor]) -> None:
            hidden, layout, extracted = args
            seen[index].visual, seen[index].rows = hidden[layout.visual_rows], layout.row_counts
            seen[index].extracted = extracted.detach().clone()

        handles.append(layer.extractor.register_forward_pre_hook(enter))
        handles.append(layer.injection.register_forward_pre_hook(inject))

    try:
        for index in adapter.config.layer_indices:
            watch(index, adapter.layer(index))
        for name, module in adapter.named_modules():
            if isinstance(module, Unit):
                note(name, module)
        yield seen, parameters
    finally:
        for handle in handles:
            handle.remove()


def _gradients(
    parameters: Mapping[str, nn.Parameter], loss: Tensor, features: ImageFeatures | None
) -> dict[str, Gradient]:
    """Sum norms by group; ``.grad`` is neither read nor written, and the graph of the caller's features is kept."""
    named = [(name, parameter) for name, parameter in parameters.items() if parameter.requires_grad]
    if not named:
        return {}
    theirs = features is not None and any(own.requires_grad for own in features.maps)
    trained = [parameter for _, parameter in named]
    found = torch.autograd.grad(loss, trained, allow_unused=True, retain_graph=theirs)
    squares: dict[str, float] = {}
    elements: dict[str, int] = {}
    for (name, parameter), gradient in zip(named, found, strict=True):
        group = _group(name)
        square = 0.0 if gradient is None else float(gradient.double().square().sum())
        squares[group] = squares.get(group, 0.0) + square
        elements[group] = elements.get(group, 0) + parameter.numel()
    return {group: Gradient(math.sqrt(squares[group]), elements[group]) for group in squares}


def _group(name: str) -> str:
    """Name the group of an adapter's parameter: "layers.2.extractor.q_proj.weight" -> "2.extractor.q"."""
    parts = name.split(".")
    if parts[0] != "layers":
        return parts[0]
    part = ".".join(parts[2:4])
    return f"{parts[1]}.{_GROUPS.get(part, part)}"


def _layer_health(layer: HiALayer, seen: _Seen) -> LayerHealth:
    extracted = direct.exact(seen.extracted).unflatten(0, (len(seen.rows), -1))  # [n, M, D]
    visual = direct.exact(seen.visual).split(seen.rows)
    with torch.autocast(seen.visual.device.type, enabled=False):
        queries, instruction_ratio = direct.conditioned_queries(layer.extractor, direct.exact(seen.instruction))
        reads, entropies = [], []
        for tokens, rows in zip(extracted, visual, strict=True):
            read, entropy = direct.read(layer.injection, rows, tokens)
            reads.append(read)
            entropies.append(entropy)
        updates = [direct.update(layer.injection, read) for read in reads]
        return LayerHealth(
            extraction_entropy=_extraction_entropy(layer.extractor, queries, seen),
            injection_entropy=_mean(entropies),
            query_cosine=_mean([direct.mean_cosine(tokens) for tokens in extracted]),
            effective_rank=_mean([direct.effective_rank(tokens) for tokens in extracted]),
            instruction_ratio=instruction_ratio,
            update_ratio=direct.ratio(torch.cat(updates), torch.cat(visual)),
            read_cosine=_mean([direct.mean_cosine(read) for read in reads]),
            update_cosine=_mean([direct.mean_cosine(update) for update in updates]),
        )


def _extraction_entropy(extractor: Extractor, queries: Tensor, seen: _Seen) -> float | None:
    """Average over images, one after the other, which bounds the memory at the largest one's."""
    found = []
    owners = seen.image_to_sample.tolist()
    for owner, tokens in zip(owners, seen.features.tokens.split(seen.features.lengths), strict=True):
        k = direct.image_keys(extractor, direct.exact(tokens))
        found.append(direct.attend(queries[owner], k)[1])
    return _mean(found)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
