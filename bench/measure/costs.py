"""FLOPs and bytes of a workload: of the mathematics as it is written down, whatever a provider does instead.

An op's are its own ``inputs.py``'s. A composite's mathematics has cheaper exact forms; :func:`least_flops` is of the
cheapest, and what its roofline is made of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from hia.layers.plan import Sizes, extract_forms, inject_forms

from ..providers.layers import TEXTBOOK, our_step, used_weights
from ..workloads import Inputs, LayerCase, OpEntry, Workload, composite_entry

# products of the attention's backward over those of its forward: scores once more, dv, dp, dq, dk
ATTENTION_BACKWARD = 5 / 2
PASSES = {"dispatch": "forward"}  # modes that cost what another one does


def flops(workload: Workload, inputs: Inputs, weights: dict[str, Tensor] | None, mode: str) -> int:
    """Count FLOPs, 2 a multiply-add, of matrix products and convolutions; of composites by the ops' own formulas.

    Args:
        workload: op or composite.
        inputs: its arguments; only a composite's are used, of them the shapes.
        weights: a composite's.
        mode: "forward", "backward", "both" or "dispatch".
    """
    mode = PASSES.get(mode, mode)
    if isinstance(workload.entry, OpEntry):
        return workload.entry.inputs.flops(workload.shape, mode)
    forward = _count(workload, inputs, weights or {}, gradients=False) - _overcount(workload)
    if mode == "forward":
        return forward
    both = _count(workload, inputs, weights or {}, gradients=True)
    both -= round(_overcount(workload) * (1 + ATTENTION_BACKWARD))
    return both if mode == "both" else both - forward


def least_flops(workload: Workload, textbook: int, itemsize: int) -> int:
    """Count the FLOPs of the cheapest exact form known, which a roofline must not be above.

    Args:
        workload: op or composite.
        textbook: its FLOPs by :func:`flops`.
        itemsize: bytes of an element.
    """
    case, entry = workload.case, workload.entry
    if isinstance(entry, OpEntry) or not entry.parts:
        return textbook
    training = entry.trains
    config = case.config
    sizes = Sizes(
        hidden_size=case.hidden_size,
        dim=config.dim,
        heads=config.num_heads,
        queries=case.num_queries,
        channels=case.channels,
        samples=case.batch,
        features=tuple(case.feature_lengths),
        visual=(case.visual_tokens,) * case.images,
        itemsize=itemsize,
        training=training,
        weights_folded=not training,
        sharing=len(config.layer_indices) if config.shared_projection else 0,
        cached=("kv",) if workload.op == "second_question" else (),
    )
    saved = 0.0
    for part in entry.parts:
        counts = {form.name: form.flops for form in (extract_forms if part == "extract" else inject_forms)(sizes)}
        saved += counts["direct"] - min(counts.values())
    return textbook - round(saved)


def _count(workload: Workload, inputs: Inputs, weights: dict[str, Tensor], *, gradients: bool) -> int:
    """Count a composite's FLOPs under fake tensors: nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(tensor: Tensor) -> Tensor:
            return mode.from_tensor(tensor.detach())

        arguments = {name: tree_map_only(Tensor, fake, value) for name, value in inputs.items()}
        if "layout" in inputs:
            fields = {name: tree_map_only(Tensor, fake, value) for name, value in vars(inputs["layout"]).items()}
            arguments["layout"] = type(inputs["layout"])(**fields)
        step = our_step(workload.case, {name: fake(tensor) for name, tensor in weights.items()}, TEXTBOOK)
        leaves = list(step.parameters()) + ([arguments["hidden"]] if "hidden" in arguments else [])
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradients):
            if gradients:
                for leaf in leaves:
                    leaf.requires_grad_()
            outs = getattr(step, workload.op)(**arguments)
            if gradients:  # backward, not grad: the counter's hooks refuse the latter
                torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    return counter.get_total_flops()


def _overcount(workload: Workload) -> int:
    """Return what the attention's formula, which sees shapes alone, counts beyond the ragged lengths' sum."""
    return sum(_padding(workload.case, part) for part in composite_entry(workload.op).parts)


def _padding(case: LayerCase, role: str) -> int:
    lengths_q, lengths_k = case.attention_lengths(role)
    real = sum(q * k for q, k in zip(lengths_q, lengths_k, strict=True))
    return 4 * (sum(lengths_q) * max(lengths_k) - real) * case.config.dim


def moved_bytes(
    workload: Workload, inputs: Inputs, weights: dict[str, Tensor] | None, outs: Any, mode: str, *, itemsize: int
) -> int:
    """Count what must at least move: every input and parameter read once, every output and gradient written once.

    What lies between, such as the activations between convolutions, isn't counted.

    Args:
        workload: op or composite.
        inputs: a composite's arguments.
        weights: a composite's.
        outs: a composite's results.
        mode: "forward", "backward", "both" or "dispatch".
        itemsize: bytes of an element, of an op.
    """
    mode = PASSES.get(mode, mode)
    if isinstance(workload.entry, OpEntry):
        return workload.entry.inputs.moved_bytes(workload.shape, itemsize, mode)
    weights = used_weights(workload.op, weights)
    read = _read_bytes(workload, inputs) + _nbytes(weights)
    forward = read + _written_bytes(workload, inputs, outs)
    backward = read + _nbytes(outs) + _nbytes(weights) + _nbytes(inputs.get("hidden"))
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def _read_bytes(workload: Workload, inputs: Inputs) -> int:
    total = _nbytes({name: value for name, value in inputs.items() if name != "layout"})
    if "layout" in inputs:
        total += _touched_bytes(workload, inputs) - _nbytes(inputs["hidden"])
    return total


def _written_bytes(workload: Workload, inputs: Inputs, outs: Any) -> int:
    """Count what is written; an injection is in place, so only the visual rows are."""
    entry = composite_entry(workload.op)
    if "inject" in entry.parts and not entry.trains:
        return _touched_bytes(workload, inputs)
    return _nbytes(outs)


def _touched_bytes(workload: Workload, inputs: Inputs) -> int:
    """Count the rows of the hidden states that it reads: the visual ones; "extract" the instruction's."""
    layout, hidden = inputs["layout"], inputs["hidden"]
    rows = layout.instruction_rows if workload.op == "extract" else layout.visual_rows
    return rows.shape[0] * hidden.shape[-1] * hidden.element_size()


def _nbytes(values: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
