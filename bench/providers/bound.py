"""A provider made ready for a workload: what one call is, what it is differentiated in, and how results are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..workloads import Inputs

Outputs = tuple[Tensor, ...]


@dataclass
class Bound:
    """A provider made ready for one workload; everything that needn't be timed is done.

    Attributes:
        forward: one call.
        leaves: what gradients are taken of, by the provider's names; they require them.
        canonical: gradients by its names to what is compared: :func:`by_argument` or :func:`by_part`.
        restore: undo what a call in place has done.
        limit: what a row is a limit of, that computes no result to check; else "".
        notes: for the record's ``extra``, read after a call.
    """

    forward: Callable[[], Outputs]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    canonical: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    restore: Callable[[], None] = lambda: None
    limit: str = ""
    notes: Callable[[], dict[str, Any]] = dict


def dout_like(outs: Outputs) -> Outputs:
    """Draw incoming gradients: numbers that every dtype has."""
    generator = torch.Generator(outs[0].device).manual_seed(7)
    return tuple(
        torch.randn(out.shape, generator=generator, device=out.device).bfloat16().to(out.dtype) for out in outs
    )


def backward_call(bound: Bound, outs: Outputs, douts: Outputs) -> Callable[[], Any]:
    """Return a call of the backward alone, on a graph that is kept."""
    leaves = list(bound.leaves.values())
    return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True, allow_unused=True)


def both_call(bound: Bound, douts: Outputs) -> Callable[[], Any]:
    """Return a call of forward and backward."""
    leaves = list(bound.leaves.values())
    return lambda: torch.autograd.grad(bound.forward(), leaves, douts, allow_unused=True)


def by_argument(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name an op's gradients, each compared by itself."""
    return {f"d{name}": gradient for name, gradient in gradients.items()}


def by_part(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join a composite's gradients by our names: the encoder's, the extractor's, the injection's, and hidden's.

    One by one they would not bear the policy: that of the keys' bias is zero but for rounding, since it drops out
    of the softmax, and that of a norm's eight channels is as far from the truth as chance has it.
    """
    parts: dict[str, list[Tensor]] = {}
    for name in sorted(gradients):
        part = next((part for part in ("extractor", "injection") if f".{part}." in name), name.partition(".")[0])
        parts.setdefault(f"d{part}", []).append(gradients[name])
    return {part: x[0] if len(x) == 1 else torch.cat([y.flatten() for y in x]) for part, x in parts.items()}


def bind_function(function: Callable[..., Any], arguments: Inputs, wrt: tuple[str, ...], *, gradients: bool) -> Bound:
    """Bind an op's arguments by name, floating tensors of ``wrt`` made leaves."""
    leaves: dict[str, Tensor] = {}
    if gradients:
        named = {name: arguments.get(name) for name in wrt}  # a peer may take another form of one
        floating = {name: x for name, x in named.items() if x is not None and x.is_floating_point()}
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in floating.items()}
    ready = {**arguments, **leaves}

    def forward() -> Outputs:
        out = function(**ready)
        return out if isinstance(out, tuple) else (out,)

    return Bound(forward, leaves, by_argument)


def bind_step(
    step: Any, op: str, arguments: Inputs, *, gradients: bool, run: Callable[..., Any] | None = None
) -> Bound:
    """Bind a composite of a step with its parameters as leaves; ``run`` is called instead of the step's own method.

    The hidden states are a copy of its own: without gradients injecting happens in place.
    """
    ready, leaves = dict(arguments), {}
    source = arguments.get("hidden")
    if source is not None:
        ready["hidden"] = source.detach().clone()
    for parameter in step.parameters():
        parameter.requires_grad_(gradients)
    if gradients:
        leaves = dict(step.named_parameters())
        if source is not None:
            leaves["hidden"] = ready["hidden"].requires_grad_()
    method = run or getattr(step, op)

    def restore() -> None:
        if source is not None and not gradients:
            ready["hidden"].copy_(source)

    return Bound(lambda: method(**ready), leaves, lambda grads: by_part(step.canonical(grads)), restore)
