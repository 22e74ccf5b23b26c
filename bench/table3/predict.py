"""Predictions for Table 3: every method at every resolution under fake tensors."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..measure.footprint import Footprint, fake_mode, footprint
from . import methods
from .hosts import HostSpec


@dataclass(frozen=True)
class Task:
    """One method at one resolution.

    Attributes:
        method: see ``methods.METHODS``.
        resolution: pixels.
        attentions: implementations to follow, each in its own pass.
        host: the MLLM.
        dtype: of weights and activations.
        images: per sample.
        text_tokens: beside the images'.
        cuda: predict for a CUDA card, or for this CPU.
    """

    method: str
    resolution: int
    attentions: tuple[str, ...]
    host: HostSpec
    dtype: torch.dtype
    images: int
    text_tokens: int
    cuda: bool


@dataclass(frozen=True)
class Prediction:
    """A task's result: FLOPs counted in the first attention's pass, and each attention's footprint."""

    task: Task
    flops: int
    footprints: dict[str, Footprint]


@dataclass
class Predictor:
    """Runs tasks; keeps the last method's fake model, since building one takes as long as following it."""

    _key: Any = None
    _model: nn.Module | None = None
    _tiled: dict[Any, Prediction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with fake_mode() as mode:
            self._mode = mode

    def __call__(self, task: Task) -> Prediction:
        # LLaVA-NeXT cuts every larger square into the same tiles
        grid = methods.anyres_grid(task.resolution) if task.method == "anyres" else None
        known = self._tiled.get((grid, task.attentions, task.host.name, task.cuda))
        if grid is not None and known is not None:
            return Prediction(task, known.flops, known.footprints)
        with self._mode:
            prediction = self._run(task)
        if grid is not None:
            self._tiled[grid, task.attentions, task.host.name, task.cuda] = prediction
        return prediction

    def _run(self, task: Task) -> Prediction:
        key = (task.method, task.host.name, task.dtype)
        if self._model is None or self._key != key:
            self._model = methods.build_fake_model(task.method, task.host, task.dtype, task.attentions[0])
            self._key = key
        shape = (task.resolution, task.resolution, 3)
        pixels = [torch.zeros(shape, dtype=torch.uint8) for _ in range(task.images)]
        sample = methods.Sample(pixels, [1] * task.text_tokens)
        inputs = methods.make_inputs(task.method, self._model, task.host, sample)
        del sample, pixels
        footprints: dict[str, Footprint] = {}
        for attention in task.attentions:
            methods.host_of(task.method, self._model).set_attn_implementation(attention)
            footprints[attention] = footprint(self._model, inputs, cuda=task.cuda, count_flops=not footprints)
        return Prediction(task, footprints[task.attentions[0]].flops, footprints)


_predictor: Predictor | None = None


def start_worker() -> None:
    """Prepare a pool's process: one thread, and Ctrl-C left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def predict_in_worker(task: Task) -> Prediction:
    """Run a task in a pool's process, whose fake model is reused from task to task."""
    global _predictor
    if _predictor is None:
        _predictor = Predictor()
    return _predictor(task)
