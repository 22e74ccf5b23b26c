"""One question as a user asks it, in each of the ways of reading a large image: the subjects of ``bench end-to-end``.

A :class:`Subject` is one method's model with one batch on one device. Its steps return the milliseconds of every
repetition of what they time: a prefill that ends in the first token, single decode steps, a training step.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..measure.footprint import held_beside
from ..measure.memory import tensors_in, user_meter
from ..table3 import formulas, methods
from ..table3.hosts import BASE_RESOLUTION, HostSpec
from ..workloads.images import ImageSource

LABELS = {
    "plain": "plain: LLaVA as it is, the images shrunk to 336",
    "baseline": methods.LABELS["baseline"],
    "anyres": methods.LABELS["anyres"],
    "released": methods.LABELS["released"],
    "hia": methods.LABELS["hia"],
}
PROVIDERS = tuple(LABELS)
OPS = ("time_to_first_token", "second_question", "decode", "train_step")
ANSWER_TOKENS = 32  # that have a loss in a training step: the last of the text
TRAINED = {"released": "adapter", "hia": "adapter"}  # the others' projector, as in LLaVA's first stage
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Case:
    """A case, whose providers are timed side by side.

    Attributes:
        op: of :data:`OPS`: "time_to_first_token" of a first question; of a "second_question", about images whose
            features are cached; "decode" of one more token a prompt; "train_step".
        resolution: side of the square images, pixels.
        batch: prompts at a time.
        images: per prompt.
    """

    op: str
    resolution: int
    batch: int
    images: int

    @property
    def name(self) -> str:
        """Return its name in records."""
        return f"{self.resolution}px-{self.images}img-b{self.batch}"

    @property
    def mode(self) -> str:
        """Return its mode in records: a training step goes forward and backward."""
        return "both" if self.op == "train_step" else "forward"


@dataclass(frozen=True)
class Setting:
    """The setting that all cases of a run share.

    Attributes:
        spec: the host's shapes.
        dtype: of weights and activations.
        device: "cpu" or "cuda".
        attention: the host's implementation, eager or sdpa.
        source: of the radiographs.
        text: token ids of the question.
        new_tokens: decode steps a repetition.
        checkpointing: gradient checkpointing in training steps.
    """

    spec: HostSpec
    dtype: torch.dtype
    device: str
    attention: str
    source: ImageSource
    text: tuple[int, ...]
    new_tokens: int
    checkpointing: bool


def method_of(provider: str) -> str:
    """Return the name ``bench.table3.methods`` has for it: the plain host is the baseline at 336."""
    return "baseline" if provider == "plain" else provider


def resolution_seen(provider: str, resolution: int) -> int:
    """Return the side of the images that a provider is given, pixels."""
    return BASE_RESOLUTION if provider == "plain" else resolution


def not_offered(provider: str, case: Case) -> str | None:
    """Say why a provider has no number for a case; None if it has one."""
    if case.op == "second_question" and provider != "hia":
        return "keeps no features of its images: its second question costs what its first one does"
    if provider == "released" and case.batch > 1:
        return f"the released maths takes one prompt at a time, got a batch of {case.batch}"
    return None


def build(provider: str, setting: Setting) -> nn.Module:
    """Build a provider's model with random weights and no parameter that needs a gradient."""
    with torch.device(setting.device):
        model = methods.build_model(method_of(provider), setting.spec, setting.dtype, setting.attention)
    return model.requires_grad_(False)


def batch_inputs(provider: str, model: nn.Module, setting: Setting, case: Case) -> dict[str, Any]:
    """Make the keyword arguments of a prefill of ``case.batch`` prompts, every one with images of its own."""
    resolution, method = resolution_seen(provider, case.resolution), method_of(provider)
    pictures = setting.source.load(case.batch * case.images, resolution)
    samples = []
    for number in range(case.batch):
        own = pictures[number * case.images : (number + 1) * case.images]
        sample = methods.Sample(own, setting.text)
        samples.append(methods.make_inputs(method, model, setting.spec, sample, setting.device))
    return joined(samples)


def joined(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Join several prompts' inputs to one batch's; a prompt's images are numbered behind those of the ones before."""
    batch = dict(samples[0])
    if len(samples) == 1:
        return batch
    for name, value in batch.items():
        values = [sample[name] for sample in samples]
        if name == "image_map":
            images = len(samples[0]["high_res_pixels"])
            shifted = [torch.where(map_ >= 0, map_ + number * images, map_) for number, map_ in enumerate(values)]
            batch[name] = torch.cat(shifted)
        elif isinstance(value, Tensor):
            batch[name] = torch.cat(values)
        elif isinstance(value, list):
            batch[name] = [entry for entries in values for entry in entries]
    return batch


class Subject:
    """One provider on one case; ``case.op`` says what :meth:`repetition` times.

    Args:
        provider: of :data:`PROVIDERS`.
        model: of :func:`build`.
        setting: of the run.
        case: what to time.
    """

    def __init__(self, provider: str, model: nn.Module, setting: Setting, case: Case) -> None:
        self.provider, self.model, self.setting, self.case = provider, model, setting, case
        self.host = methods.host_of(method_of(provider), model)
        self.inputs = batch_inputs(provider, model, setting, case)
        self.tokens = int(self.inputs["input_ids"].shape[1])
        self._cache: Any = None
        self._next: Tensor | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._stack = ExitStack()
        if case.op == "second_question":
            pixels, windows = self.inputs.pop("high_res_pixels"), self.inputs.pop("windows")
            with torch.no_grad():
                self.inputs["features"] = model.encode_images(pixels, windows)
        if case.op == "train_step":
            try:
                self._start_training()
            except BaseException:  # half begun, the model would stay in training mode
                self.close()
                raise

    def close(self) -> None:
        """Leave the model as it was found."""
        self._stack.close()
        self._cache = self._next = self._optimizer = None
        self.inputs = {}

    def repetition(self) -> list[float]:
        """Run one repetition and return its milliseconds: one number, or one a decode step."""
        return {"decode": self._decode, "train_step": self._train}.get(self.case.op, self._prefill)()

    def trained(self) -> list[nn.Parameter]:
        """List what a training step changes: the adapter, or without one the projector, as LLaVA's first stage."""
        module = getattr(self.model, TRAINED.get(self.provider, ""), None) or self.host.model.multi_modal_projector
        return list(module.parameters())

    def own_bytes(self) -> int:
        """Count what is alive before a repetition: parameters, buffers, folded weights, inputs, kept features."""
        tensors: dict[int, int] = {}
        held = [*self.model.parameters(), *self.model.buffers(), *held_beside(self.model), *tensors_in(self.inputs)]
        for tensor in held:
            tensors[tensor.data_ptr()] = tensor.nbytes
        features = self.inputs.get("features")
        return sum(tensors.values()) + (0 if features is None else features.nbytes)

    def least_bytes(self) -> int:
        """Count what one repetition must at least read: every parameter it uses once; decoding needs no encoder."""
        used = self.host if self.case.op != "decode" else self.host.model.language_model
        read = sum(parameter.nbytes for parameter in (self.model if used is self.host else used).parameters())
        return read + (self.host.lm_head.weight.nbytes if used is not self.host else 0)

    def _timed(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Time a call on the wall until the device has finished, in milliseconds: what a user waits."""
        if self.setting.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = function()
        if self.setting.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3, result

    @torch.no_grad()
    def _first_token(self) -> Any:
        output = self.model(**self.inputs)
        return output.logits[:, -1:].argmax(-1), output.past_key_values

    def _prefill(self) -> list[float]:
        elapsed, _ = self._timed(self._first_token)
        return [elapsed]

    @torch.no_grad()
    def _decode(self) -> list[float]:
        if self._cache is None:
            self._next, self._cache = self._first_token()
        token, times = self._next, []
        for _ in range(self.setting.new_tokens):
            elapsed, token = self._timed(lambda token=token: self._one_token(token))
            times.append(elapsed)
        # a negative count means "drop so many", in every version of transformers
        self._cache.crop(-self.setting.new_tokens)
        return times

    def _one_token(self, token: Tensor | None) -> Tensor:
        output = self.host(input_ids=token, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1)

    def _start_training(self) -> None:
        self.inputs |= {"use_cache": False, "logits_to_keep": 0}
        labels = torch.full_like(self.inputs["input_ids"], -100)
        answer = min(ANSWER_TOKENS, len(self.setting.text) - 1)
        labels[:, -answer:] = self.inputs["input_ids"][:, -answer:]
        if "instruction_index" in self.inputs:
            last = self.tokens - 1 - answer
            index = self.inputs["instruction_index"]
            self.inputs["instruction_index"] = torch.full_like(index, last) if isinstance(index, Tensor) else last
        self.inputs["labels"] = labels
        if self.provider == "hia":  # what was folded would be out of date after the first step
            self.model.unfold_weights()
            self._stack.callback(self.model.fold_weights)
        self._stack.enter_context(training(self.model, self.host, self.setting.checkpointing))
        parameters = self.trained()
        for parameter in parameters:
            parameter.requires_grad_(True)
        self._stack.callback(lambda: [forget(parameter) for parameter in parameters])
        self._optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)

    def _train(self) -> list[float]:
        elapsed, _ = self._timed(self._step)
        return [elapsed]

    def _step(self) -> None:
        optimizer = self._optimizer
        if optimizer is None:
            raise RuntimeError("Subject: a training step must come before close(), got a closed subject")
        inputs = dict(self.inputs)
        with ExitStack() as stack:
            if self.provider == "released":
                # its hooks must still be there when checkpointing runs a layer again
                where = {name: inputs.pop(name) for name in ("image_rows", "instruction_index")}
                where["pixels"] = inputs.pop("high_res_pixels")
                stack.enter_context(self.model.adapter.attach(self.host, **where))
                loss = self.host(**inputs).loss
            else:
                loss = self.model(**inputs).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def forget(parameter: nn.Parameter) -> None:
    """Drop a parameter's gradient, and the need of one."""
    parameter.requires_grad_(False)
    parameter.grad = None


@contextmanager
def training(model: nn.Module, host: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Turn on training mode, and gradient checkpointing where asked for; both end with the block."""
    model.train()
    if checkpointing:
        host.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if checkpointing:
            host.gradient_checkpointing_disable()
        model.eval()


def repeat_with_peak(subject: Subject) -> tuple[list[float], int | None]:
    """Run one repetition: its milliseconds, and the most bytes it held above what was there; None if unknown."""
    meter = user_meter(subject.setting.device)  # counts from what is there now
    if meter is None:
        return subject.repetition(), None
    found = meter.measure(subject.repetition)
    return found.result, found.peak


def flops(provider: str, setting: Setting, case: Case) -> int | None:
    """Count a first question's prefill by the formula of Table 3; None for the rest, which it doesn't cover."""
    if case.op != "time_to_first_token":
        return None
    resolution = resolution_seen(provider, case.resolution)
    text = len(setting.text)
    return case.batch * formulas.prefill_flops(
        method_of(provider),
        setting.spec,
        resolution,
        case.images,
        text,
        device=setting.device,
        itemsize=setting.dtype.itemsize,
    )


def free(device: str) -> None:
    """Give back what deleted models held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
