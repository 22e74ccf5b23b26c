"""FLOPs and bytes of a workload: of the mathematics as it is written down, whatever a provider does instead.

A composite's mathematics has cheaper exact forms; :func:`least_flops` is of the cheapest, and what its floor is
made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import hia_kernels
from hia.plan import Sizes, extract_forms, inject_forms

from .cases import TRAIN_STEPS, ImageCase, LayerCase, Workload
from .composites import PARTS, TEXTBOOK, our_step, used_weights
from .inputs import DIFFERENTIABLE, Inputs

# products of the attention's backward over those of its forward: scores once more, dv, dp, dq, dk
ATTENTION_BACKWARD = 5 / 2


def flops(workload: Workload, inputs: Inputs, weights: dict[str, Tensor] | None, mode: str) -> int:
    """By the formulas registered with the ops; 2 a multiply-add, matrix products and convolutions only.

    Args:
        workload: op or composite.
        inputs: its arguments; only their shapes are used.
        weights: a composite's.
        mode: "forward", "backward", "both" or "dispatch".
    """
    forward = _count(workload, inputs, weights, gradients=False) - _overcount(workload)
    if mode in ("forward", "dispatch"):
        return forward
    both = _count(workload, inputs, weights, gradients=True) - round(_overcount(workload) * (1 + ATTENTION_BACKWARD))
    return both if mode == "both" else both - forward


def least_flops(workload: Workload, textbook: int, itemsize: int) -> int:
    """Of the cheapest exact form known, which a floor must not be above; ``textbook`` where there is one form only.

    Args:
        workload: op or composite.
        textbook: its FLOPs by :func:`flops`.
        itemsize: bytes of an element.
    """
    case, training = workload.case, workload.op in TRAIN_STEPS
    if not isinstance(case, LayerCase):
        return textbook
    config = case.config
    sizes = Sizes(
        hidden_size=case.hidden_size, dim=config.dim, heads=config.num_heads, queries=case.num_queries,
        channels=case.channels, samples=case.batch, features=tuple(case.feature_lengths),
        visual=(case.visual_tokens,) * case.images, itemsize=itemsize, training=training, prepared=not training,
        sharing=len(config.layer_indices) if config.shared_projection else 0,
        cached=("kv",) if workload.op == "second_question" else (),
    )  # fmt: skip
    saved = 0.0
    for part in PARTS.get(workload.op, ()):
        counts = {form.name: form.flops for form in (extract_forms if part == "extract" else inject_forms)(sizes)}
        saved += counts["textbook"] - min(counts.values())
    return textbook - round(saved)


def _count(workload: Workload, inputs: Inputs, weights: dict[str, Tensor] | None, *, gradients: bool) -> int:
    """Under fake tensors: nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(tensor: Tensor) -> Tensor:
            return mode.from_tensor(tensor.detach())

        arguments = {name: tree_map_only(Tensor, fake, value) for name, value in inputs.items()}
        if "layout" in inputs:
            fields = {name: tree_map_only(Tensor, fake, value) for name, value in vars(inputs["layout"]).items()}
            arguments["layout"] = type(inputs["layout"])(**fields)
        function, leaves = _callable(workload, arguments, weights, fake)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradients):
            if gradients:
                for leaf in leaves:
                    leaf.requires_grad_()
            outs = function()
            if gradients:  # backward, not grad: the counter's hooks refuse the latter
                torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    return counter.get_total_flops()


def _callable(
    workload: Workload, arguments: Inputs, weights: dict[str, Tensor] | None, fake: Callable[[Tensor], Tensor]
) -> tuple[Callable[[], Any], list[Tensor]]:
    if weights is None:
        leaves = [arguments[name] for name in DIFFERENTIABLE[workload.op] if arguments[name] is not None]
        return lambda: tree_leaves(getattr(hia_kernels, workload.op)(**arguments)), leaves
    step = our_step(workload.case, {name: fake(tensor) for name, tensor in weights.items()}, TEXTBOOK)
    leaves = list(step.parameters()) + ([arguments["hidden"]] if "hidden" in arguments else [])
    return lambda: getattr(step, workload.op)(**arguments), leaves


def _overcount(workload: Workload) -> int:
    """What the attention's formula, which sees shapes alone, counts beyond the ragged lengths' sum."""
    if isinstance(workload.case, ImageCase):
        return 0
    roles = {"extract": ("extract",), "inject": ("inject",), "cross_attention": (workload.role,)}
    layer = ("extract", "inject") if workload.level == "composite" else ()
    return sum(_padding(workload.case, role) for role in roles.get(workload.op, layer))


def _padding(case: LayerCase, role: str) -> int:
    lengths_q, lengths_k = case.attention_lengths(role)
    real = sum(q * k for q, k in zip(lengths_q, lengths_k, strict=True))
    return 4 * (sum(lengths_q) * max(lengths_k) - real) * case.config.dim


def moved_bytes(workload: Workload, inputs: Inputs, weights: dict[str, Tensor] | None, outs: Any, mode: str) -> int:
    """What must at least move: every input and parameter read once, every output and gradient written once.

    What lies between, such as the activations between convolutions, isn't counted.
    """
    weights = used_weights(workload.op, weights)
    read = _read_bytes(workload, inputs) + _nbytes(weights)
    written = _written_bytes(workload, inputs, outs)
    if mode in ("forward", "dispatch"):
        return read + written
    gradients = _gradient_bytes(workload, inputs, weights)
    saved = _nbytes(outs)
    if workload.op in ("cross_attention", "latent_attention"):  # out beside dout
        saved *= 2
    if workload.op == "row_softmax":  # the probabilities instead of the scores, and dout
        read, saved = 0, 2 * saved
    if workload.op == "inject_rows":
        read -= _nbytes(inputs["hidden"])  # never saved: its gradient is dout
    backward = read + saved + gradients
    if mode == "backward":
        return backward
    return _read_bytes(workload, inputs) + _nbytes(weights) + written + backward


def _read_bytes(workload: Workload, inputs: Inputs) -> int:
    total = _nbytes({name: value for name, value in inputs.items() if name != "layout"})
    gathered = {"condition_queries": "hidden", "norm_linear": "x"}.get(workload.op)
    if gathered is not None and inputs["row_idx"] is not None:
        source = inputs[gathered]
        total += (inputs["row_idx"].shape[0] - source.shape[0]) * source.shape[1] * source.element_size()
    if "layout" in inputs:
        total += _touched_bytes(workload, inputs) - _nbytes(inputs["hidden"])
    return total


def _written_bytes(workload: Workload, inputs: Inputs, outs: Any) -> int:
    """A composite's injection is in place: only the visual rows are written."""
    if workload.op in ("inject", "adapter_layer", "second_question"):
        return _touched_bytes(workload, inputs)
    return _nbytes(outs)


def _touched_bytes(workload: Workload, inputs: Inputs) -> int:
    """Rows of the hidden states that a composite reads: the visual ones; "extract" the instruction's."""
    layout, hidden = inputs["layout"], inputs["hidden"]
    rows = layout.instruction_rows if workload.op == "extract" else layout.visual_rows
    return rows.shape[0] * hidden.shape[-1] * hidden.element_size()


def _gradient_bytes(workload: Workload, inputs: Inputs, weights: dict[str, Tensor]) -> int:
    if workload.level == "composite":
        return _nbytes(weights) + _nbytes(inputs.get("hidden"))
    return _nbytes([inputs[name] for name in DIFFERENTIABLE[workload.op]])


def _nbytes(values: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
