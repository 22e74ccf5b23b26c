"""The convolutions of ResNet-50: their configurations, then backends timed against each other at each shape.

The op's table takes the fastest backend from the file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import hia_kernels
from hia_kernels.ops.conv_norm_act import cudnn
from hia_kernels.ops.conv_norm_act import inputs as convolution
from hia_kernels.ops.conv_norm_act.reference import conv_norm_act_ref
from hia_kernels.testing import analysed

from ..measure.accuracy import Truth
from ..measure.timing import Budget, Clock, interleaved
from .search import BUDGET, GAIN, Tuned, recording, tune_key, using

CANDIDATES = {"conv_norm_act": ("triton", "cudnn")}  # the first serves where nothing was measured


def _drawn(shape: convolution.Shape, dtype: torch.dtype, device: str) -> tuple[dict[str, Any], Truth]:
    """Draw a convolution's arguments, weights in the order that kernels read, and compute what is right."""
    inputs = convolution.make_inputs(shape, dtype, device)
    inputs["weight"] = inputs["weight"].contiguous(memory_format=torch.channels_last)
    exact, plain = conv_norm_act_ref(**analysed(inputs, dtype)), conv_norm_act_ref(**inputs)
    return inputs, Truth({"out0": exact}, {"out0": plain}, dtype)


def tune_shape(
    shape: convolution.Shape,
    dtype: torch.dtype,
    tuned: Tuned,
    clock: Clock,
    device: str = "cuda",
    begin: Callable[[str], None] = lambda _name: None,
) -> None:
    """Tune the keys of a convolution's forward that were not met before; ``begin`` is told each of them."""
    inputs, truth = _drawn(shape, dtype, device)

    def call() -> torch.Tensor:
        with hia_kernels.use_backend(CANDIDATES["conv_norm_act"][0]):
            return hia_kernels.conv_norm_act(**inputs)

    with recording() as found, using(tuned.configurations):
        call()
    for name, heuristic in found.items():
        if name not in tuned.seen:
            tuned.seen[name] = heuristic
            begin(name)
            tune_key(name, tuned, call, lambda: truth.check({"out0": call()})[0], clock, BUDGET)


def race(
    shape: convolution.Shape,
    dtype: torch.dtype,
    tuned: Tuned,
    clock: Clock,
    device: str = "cuda",
    budget: Budget = BUDGET,
) -> str | None:
    """Time the backends of ``conv_norm_act`` at a shape; the first keeps what another does not clearly win.

    Returns:
        Its name in the file; None if that was measured before, or if only one of them has right results here.
    """
    inputs, truth = _drawn(shape, dtype, device)
    name = f"conv_norm_act/{cudnn.backend_key(inputs['x'], inputs['weight'], shape.stride)}"
    if name in tuned.backends:
        return None

    def with_backend(name: str) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with hia_kernels.use_backend(name), using(tuned.configurations):
                return hia_kernels.conv_norm_act(**inputs)

        return run

    calls = {}
    for candidate in CANDIDATES["conv_norm_act"]:
        try:
            wrong = truth.check({"out0": with_backend(candidate)()})[0]
        except (NotImplementedError, RuntimeError) as raised:
            wrong = str(raised)
        if wrong is None:
            calls[candidate] = with_backend(candidate)
    if len(calls) < 2:
        return None
    times = interleaved(calls, clock, budget, shortest_ms=0.0)
    medians = {candidate: samples.percentile(50) for candidate, samples in times.items() if samples.times_ms}
    usual = CANDIDATES["conv_norm_act"][0]
    if usual not in medians:
        return None
    best = min(medians, key=lambda candidate: medians[candidate])
    tuned.backends[name] = best if medians[usual] > (1 + GAIN) * medians[best] else usual
    tuned.gains[name] = round(medians[usual] / medians[tuned.backends[name]], 3)
    return name
