"""Backends timed against each other at each shape, for ops whose tables take the fastest from the device's file.

The convolutions of ResNet-50 have their configurations tuned before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import hia_kernels
from hia_kernels.ops.conv_norm_act import cudnn
from hia_kernels.ops.conv_norm_act import inputs as convolution
from hia_kernels.ops.conv_norm_act.reference import conv_norm_act_ref
from hia_kernels.ops.cross_attention import checks, measured
from hia_kernels.testing import analysed

from ..measure.accuracy import Truth, truth_of
from ..measure.timing import Budget, Clock, interleaved
from ..providers.bound import dout_like
from ..workloads import Workload, make_inputs
from .search import BUDGET, GAIN, Tuned, recording, tune_key, using

CANDIDATES = {  # the first serves where nothing was measured
    "conv_norm_act": ("triton", "cudnn"),
    "cross_attention": ("triton", "flash_attn", "cudnn", "sdpa_flash", "xformers", "sdpa_efficient"),
}
Call = Callable[[], Any]


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

    def with_backend(backend: str) -> Call:
        def run() -> torch.Tensor:
            with hia_kernels.use_backend(backend), using(tuned.configurations):
                return hia_kernels.conv_norm_act(**inputs)

        return run

    calls = {backend: with_backend(backend) for backend in CANDIDATES["conv_norm_act"]}
    return _decide(name, tuned, calls, lambda out: truth.check({"out0": out})[0], clock, budget)


def _decide(
    name: str,
    tuned: Tuned,
    calls: dict[str, Call],
    problem: Callable[[Any], str | None],
    clock: Clock,
    budget: Budget,
) -> str | None:
    """Time the backends that are right; the first keeps what another does not clearly win.

    Returns:
        ``name``; None if fewer than two of them are right here, or the first is not.
    """
    usual, fitting = next(iter(calls)), {}
    for backend, call in calls.items():
        try:
            wrong = problem(call())
        except Exception as raised:  # other libraries refuse in many ways
            wrong = str(raised)
        if wrong is None:
            fitting[backend] = call
    if len(fitting) < 2:
        return None
    times = interleaved(fitting, clock, budget, shortest_ms=0.0)
    medians = {backend: samples.percentile(50) for backend, samples in times.items() if samples.times_ms}
    if usual not in medians:
        return None
    best = min(medians, key=lambda backend: medians[backend])
    tuned.backends[name] = best if medians[usual] > (1 + GAIN) * medians[best] else usual
    tuned.gains[name] = round(medians[usual] / medians[tuned.backends[name]], 3)
    return name


def race_attention(
    workload: Workload,
    dtype: torch.dtype,
    tuned: Tuned,
    clock: Clock,
    device: str = "cuda",
    budget: Budget = BUDGET,
) -> list[str]:
    """Time the backends of ``cross_attention`` at a workload, forward and backward, each at its key.

    Only backends whose results never change from run to run race for the backward.

    Returns:
        The names in the file that were decided now.
    """
    inputs = make_inputs(workload, dtype, device)
    packing = [inputs[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")]
    qkv = [inputs[name] for name in "qkv"]
    scale = checks.scale_or_default(inputs["q"], inputs.get("softmax_scale"))
    names, decided = CANDIDATES["cross_attention"], []
    with hia_kernels.use_backend(names[0]):
        out, lse = hia_kernels.cross_attention_with_lse(**inputs)
    (dout,) = dout_like((out,))

    def forward() -> dict[str, torch.Tensor]:
        return {"out0": hia_kernels.cross_attention(**inputs)}

    def backward() -> dict[str, torch.Tensor]:
        grads = torch.ops.hia.cross_attention_bwd(dout, None, *qkv, out, lse, *packing, scale)
        return dict(zip(("dq", "dk", "dv"), grads, strict=True))

    for function, call, gradients in (("cross_attention", forward, False), ("cross_attention_bwd", backward, True)):
        name = f"cross_attention/{measured.backend_key(function, **inputs)}"
        if name in tuned.backends:
            continue
        whole = truth_of(workload, inputs, None, dtype, gradients=gradients)
        wanted = [key for key in whole.exact if key.startswith("d" if gradients else "out")]
        truth = Truth({key: whole.exact[key] for key in wanted}, whole.plain, dtype)
        fixed = names if not gradients else [one for one in names if one not in measured.NOT_DETERMINISTIC]
        calls = {backend: _forced(backend, call, tuned) for backend in fixed}
        if _decide(name, tuned, calls, lambda found, truth=truth: truth.check(found)[0], clock, budget):
            decided.append(name)
    return decided


def _forced(backend: str, call: Call, tuned: Tuned) -> Call:
    def run() -> Any:
        with hia_kernels.use_backend(backend), using(tuned.configurations), torch.no_grad():
            return call()

    return run
