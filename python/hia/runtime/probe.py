"""A probe for the layers in which a host reads where things are in its images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts import LlamaHost, find_host
from ..images.processor import IGNORED
from .health import table, untouched
from .hooks import split_layer_output
from .model import HiAModel

# A convention: behind the last read layer less than a twentieth of what the images' details do to the answers is left.
READ_SHARE = 0.05
# A rise within two standard errors of zero is noise: without any, chance exceeds it once in forty times.
STANDARD_ERRORS = 2.0
# Nats a token: bf16 rounds logits of 8 to 16 by up to 0.03 each, of which a mean over tokens keeps less than this.
LEAST_INCREASE = 0.01

_FOR_THE_ADAPTER = ("high_res_pixels", "windows", "features", "image_map", "instruction_index")


@dataclass(frozen=True)
class LayerReading:
    """The answers with the visual rows of one layer's output replaced by their image's mean.

    Attributes:
        loss: mean negative log-likelihood of an answer's token, nats.
        accuracy: share of the tokens that are the likeliest ones.
        increase: of the loss, over the unchanged host's.
        error: standard error of the increase, from its spread over tokens; infinite for one token.
        share: the increase over the one with rows replaced at the input: 1 where all reading is still to come, 0 where
            it is over; None where the host reads nothing.
    """

    loss: float
    accuracy: float
    increase: float
    error: float
    share: float | None


@dataclass(frozen=True)
class LayerProbe:
    """Result of :func:`probe_layers`; ``str()`` is a table.

    Attributes:
        loss: of the unchanged host: mean negative log-likelihood of an answer's token, nats.
        accuracy: of the unchanged host.
        blind: with the rows replaced before the first layer: nothing of *where* is left to read.
        layers: by decoder layer.
        tokens: of answers that were measured.
        threshold: the share from which a layer's output counts as read.
    """

    loss: float
    accuracy: float
    blind: LayerReading
    layers: tuple[LayerReading, ...]
    tokens: int
    threshold: float = READ_SHARE

    @property
    def reads(self) -> bool:
        """Tell whether the host reads the images' details at all: blind, it must lose more than noise."""
        return self.blind.increase > max(LEAST_INCREASE, STANDARD_ERRORS * self.blind.error)

    @property
    def last_read(self) -> int | None:
        """Find the last layer whose output's visual rows still matter; None where none does.

        They matter if replacing them costs at least :attr:`threshold` of what replacing them at the input costs, and
        more than two standard errors.
        """
        read = [
            index
            for index, layer in enumerate(self.layers)
            if layer.share is not None
            and layer.share >= self.threshold
            and layer.increase > STANDARD_ERRORS * layer.error
        ]
        return read[-1] if read else None

    def advise(self, count: int = 2) -> tuple[int, ...]:
        """Spread injections over the layers whose output is still read, by the paper's rule.

        Args:
            count: of injections.

        Returns:
            For ``HiAConfig(layers=...)``: floor(j * depth / (count + 1)), j = 1..count, with :attr:`last_read` + 1 for
            the paper's L.

        Raises:
            ValueError: the host reads nothing, or fewer layers than ``count``.
        """
        last = self.last_read
        if last is None:
            raise ValueError(f"hia: layers must be read by the host to be advised; {self._verdict()}")
        depth = last + 1
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= depth:
            raise ValueError(
                f"hia: count must be from 1 to {depth}, the layers whose output the host reads, got {count!r}"
            )
        return tuple(j * depth // (count + 1) for j in range(1, count + 1))

    def to_dict(self) -> dict[str, float]:
        """Flatten for a log.

        Returns:
            Numbers by name, e.g. "layers.13.share", "blind.loss"; what is None is left out.
        """
        flat: dict[str, float] = {"loss": self.loss, "accuracy": self.accuracy, "tokens": self.tokens}
        readings = {"blind": self.blind, **{f"layers.{index}": layer for index, layer in enumerate(self.layers)}}
        for name, reading in readings.items():
            flat.update({f"{name}.{kind}": value for kind, value in vars(reading).items() if value is not None})
        if self.last_read is not None:
            flat["last_read"] = self.last_read
        return flat

    def _verdict(self) -> str:
        last = self.last_read
        if last is not None:
            return f"the output of layer {last} is the last that the host reads"
        rise = f"{self.blind.increase:+.4f} +- {self.blind.error:.4f} nats a token over {self.tokens} tokens"
        if self.reads:
            return f"no layer's output is read: what the host loses at the input, {rise}, layer 0 has read"
        return (
            f"the host does not read where things are in its images: without that its loss changes by {rise}; train "
            f"it first, or give more answers that depend on it"
        )

    def __str__(self) -> str:
        rows = [["rows replaced", "loss", "accuracy", "increase", "error", "share"]]
        rows.append(["nowhere", f"{self.loss:.4f}", f"{self.accuracy:.4f}", "", "", ""])
        readings = [("at the input", self.blind), *((f"after layer {i}", layer) for i, layer in enumerate(self.layers))]
        for name, reading in readings:
            numbers = (reading.loss, reading.accuracy, reading.increase, reading.error)
            share = "-" if reading.share is None else f"{reading.share:.3f}"
            rows.append([name, *(f"{number:.4f}" for number in numbers), share])
        advice = ""
        if self.last_read is not None:
            advice = f"; layers={self.advise(min(2, self.last_read + 1))}"
        return f"{table(rows)}\n\n{self._verdict()}{advice}"


def probe_layers(
    model: nn.Module,
    batch: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    *,
    batches: int | None = None,
    threshold: float = READ_SHARE,
) -> LayerProbe:
    """Find the layers behind which a host no longer reads its images: an injection there comes too late.

    In the output of one layer after the other each image's visual rows are replaced by their mean over the image, which
    leaves what it is as a whole and takes where things are. As long as the answers get less likely, later layers read
    these rows. Costs L + 2 forwards a batch of a host of L layers, without gradients, in evaluation mode; the host,
    its modes and random states are as before afterwards. A :class:`hia.HiAModel`'s adapter is disabled meanwhile.

    Args:
        model: HiAModel, or a bare host.
        batch: as :class:`hia.HiAProcessor` makes it, with answers; or an iterable of such, averaged by tokens. LLaMA
            hosts need ``image_map``. Answers of samples without images are left out.
        batches: at most so many of them; None: all.
        threshold: share of the loss's increase from which a layer counts as read.

    Returns:
        The measurements, :attr:`LayerProbe.last_read` and :meth:`LayerProbe.advise`.

    Raises:
        TypeError: an unknown host, or no batch. ValueError: a batch without labels or images, or none at all;
            ``batches`` or ``threshold`` out of range.
    """
    host = model._host[0] if isinstance(model, HiAModel) else find_host(model)
    if batches is not None and (not isinstance(batches, int) or isinstance(batches, bool) or batches < 1):
        raise ValueError(f"hia: batches must be an integer of at least 1 or None, got {batches!r}")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise ValueError(f"hia: threshold must be a share from 0 to 1, got {threshold!r}")
    if not isinstance(batch, Iterable):
        raise TypeError(f"hia: batch must be a mapping or an iterable of some, got {type(batch).__name__}")
    several: Iterable[Mapping[str, Any]] = (batch,) if isinstance(batch, Mapping) else batch
    sums = [_Sums() for _ in range(len(host.layers) + 2)]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(untouched(model))
        stack.enter_context(_evaluating(model))
        if isinstance(model, HiAModel):
            stack.enter_context(model.disable_adapter())
        for inputs in islice(several, batches):
            _measure(model, host, inputs, sums)
    plain, blind, *layers = sums
    if not plain.tokens:
        raise ValueError("hia: batch must be a batch or an iterable of some, got an empty one")
    return _summary(plain, blind, layers, threshold)


@dataclass
class _Sums:
    """Sums over the answers' tokens, in fp64."""

    loss: float = 0.0
    correct: int = 0
    tokens: int = 0
    increase: float = 0.0
    squared_increase: float = 0.0

    def add(self, losses: Tensor, correct: Tensor, plain: Tensor) -> None:
        self.loss += float(losses.sum())
        self.correct += int(correct.sum())
        self.tokens += losses.numel()
        self.increase += float((losses - plain).sum())
        self.squared_increase += float((losses - plain).square().sum())

    def reading(self, blind: float | None) -> LayerReading:
        mean = self.increase / self.tokens
        variance = max(0.0, self.squared_increase / self.tokens - mean**2)
        error = math.sqrt(variance / (self.tokens - 1)) if self.tokens > 1 else math.inf
        share = None if blind is None else mean / blind
        return LayerReading(self.loss / self.tokens, self.correct / self.tokens, mean, error, share)


def _summary(plain: _Sums, blind: _Sums, layers: list[_Sums], threshold: float) -> LayerProbe:
    def probe(increase: float | None) -> LayerProbe:
        readings = tuple(layer.reading(increase) for layer in layers)
        loss, accuracy = plain.loss / plain.tokens, plain.correct / plain.tokens
        return LayerProbe(loss, accuracy, blind.reading(increase), readings, plain.tokens, threshold)

    unread = probe(None)
    return probe(unread.blind.increase) if unread.reads else unread


def _measure(model: nn.Module, host: LlamaHost, batch: Mapping[str, Any], sums: list[_Sums]) -> None:
    """Add one batch: unchanged, with rows replaced at the input, and after each layer."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"hia: batch must be a mapping or an iterable of some, got {type(batch).__name__}")
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(f"hia: batch must hold labels, the answers, got {sorted(batch)}; HiAProcessor takes answers=")
    image_map = _image_map(host, batch, labels)
    rows = _Rows(image_map)
    expected = labels[:, 1:].cpu().masked_fill(~(image_map >= 0).any(1, keepdim=True), IGNORED)
    if not bool((expected != IGNORED).any()):
        raise ValueError("hia: labels must mark answers of samples with images, got none that is not -100")
    inputs = {name: value for name, value in batch.items() if name not in (*_FOR_THE_ADAPTER, "labels")}
    inputs = {"use_cache": False, **inputs, "return_dict": True}

    plain, correct = _likelihoods(model(**inputs).logits, expected)
    sums[0].add(plain, correct, plain)
    for place, total in enumerate(sums[1:], -1):
        with _replaced(host, place, rows):
            losses, correct = _likelihoods(model(**inputs).logits, expected)
        total.add(losses, correct, plain)


def _image_map(host: LlamaHost, batch: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Return [B, S] int64 on the CPU, given or read off the prompt."""
    image_map = batch.get("image_map")
    if image_map is None:
        pixels = batch.get("pixel_values")
        image_map = host.image_map(batch.get("input_ids"), 0 if pixels is None else pixels.shape[0])
    if image_map is None or not bool((image_map >= 0).any()):
        raise ValueError(
            f"hia: batch must hold images, got {sorted(batch)}; image_map says which rows are visual tokens, and is "
            f"read off the prompt for LLaVA alone"
        )
    if image_map.shape != labels.shape:
        raise ValueError(
            f"hia: image_map must have the shape of labels {list(labels.shape)}, got {list(image_map.shape)}"
        )
    return image_map.cpu().long()


class _Rows:
    """A batch's visual rows, and the replacement of each by the mean of its image's."""

    def __init__(self, image_map: Tensor):
        flat = image_map.flatten()
        self.shape = image_map.shape
        self.rows = (flat >= 0).nonzero().flatten()  # [R]
        self.images = flat[self.rows]  # [R]
        self.counts = torch.bincount(self.images)  # [n]

    def averaged(self, hidden: Tensor) -> Tensor:
        """Average the rows of each image, [B, S, D1] -> [B, S, D1]; the sum is in fp32, or fp64 for fp64."""
        if hidden.shape[:2] != self.shape:
            raise ValueError(
                f"hia: image_map must cover the {list(hidden.shape[:2])} tokens that the decoder layers see, got "
                f"{list(self.shape)}; are tokens prepended by another adapter?"
            )
        rows, images, counts = (x.to(hidden.device) for x in (self.rows, self.images, self.counts))
        flat = hidden.flatten(0, 1)
        visual = flat[rows].to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        means = visual.new_zeros(counts.shape[0], visual.shape[1]).index_add_(0, images, visual)
        means /= counts.clamp_min(1)[:, None]
        return flat.index_copy(0, rows, means[images].to(flat.dtype)).view(hidden.shape)


@contextmanager
def _replaced(host: LlamaHost, place: int, rows: _Rows) -> Iterator[None]:
    """Replace the rows of layer ``place``'s output while inside; -1: of the first layer's input."""

    def at_input(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (rows.averaged(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": rows.averaged(kwargs["hidden_states"])}

    def at_output(_layer: nn.Module, _args: Any, output: Any) -> Any:
        hidden, rejoin = split_layer_output(output)
        return rejoin(rows.averaged(hidden))

    if place < 0:
        handle = host.layers[0].register_forward_pre_hook(at_input, with_kwargs=True)
    else:
        handle = host.layers[place].register_forward_hook(at_output)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode while inside: dropout, a PEFT adapter's, would be taken for reading."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _likelihoods(logits: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Compute of each answer's token its loss, fp64, and whether it is the likeliest, from logits and labels."""
    expected = expected.to(logits.device)
    kept = expected != IGNORED
    chosen, wanted = logits[:, :-1][kept].float(), expected[kept]  # the answers' rows alone: a vocabulary is wide
    losses = torch.nn.functional.cross_entropy(chosen, wanted, reduction="none")
    return losses.double().cpu(), (chosen.argmax(-1) == wanted).cpu()
