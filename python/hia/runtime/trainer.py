"""Training's needs beside the loss: modes of the frozen host, and groups of parameters."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import torch
from torch import nn

from ..encoder.calibration import is_pristine
from ..hosts import LlamaHost
from ..layers.adapter import HiAAdapter

ENCODER_LR_SCALE = 0.1  # with running statistics the encoder learns at a tenth of the adapter's rate, not at the whole


def set_host_mode(base: nn.Module, training: bool) -> None:
    """Set the host to evaluation, and to training only what is trained in it: a frozen module has no dropout.

    A module follows if all its parameters are trained, and so do the layers that PEFT put into the host, dropout
    included. Modules under gradient checkpointing get the bare flag, without which transformers doesn't checkpoint.

    Args:
        base: the host, PEFT's wrappers included.
        training: False sets all of it to evaluation.
    """
    base.eval()
    if not training:
        return
    for module in base.modules():
        parameters = list(module.parameters())
        if parameters and all(parameter.requires_grad for parameter in parameters):
            module.train()
        names = (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ()))
        added = [own for name in names if isinstance(own := getattr(module, name, None), nn.Module)]  # lora_A ...
        if any(parameter.requires_grad for own in added for parameter in own.parameters()):
            module.training = True  # DoRA's and LoHa's own dropout asks the layer itself; the frozen base layer doesn't
            for own in added:
                own.train()
    for module in base.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # not .train(): the children, dropout among them, stay as they are


def lost_checkpointing(layers: nn.ModuleList) -> bool:
    """Tell whether a decoder layer is to recompute its activations but lacks the flag that transformers asks for."""
    return any(getattr(layer, "gradient_checkpointing", False) and not layer.training for layer in layers)


def refuse_reentrant_checkpointing(host: LlamaHost, training: bool) -> None:
    """Raise ValueError where a layer is to be run again by re-entrant checkpointing, which would cost the gradient."""
    if not training or not torch.is_grad_enabled():
        return
    for layer in host.layers:
        owner = layer if hasattr(layer, "_gradient_checkpointing_func") else host.text_model
        function = getattr(owner, "_gradient_checkpointing_func", None)
        if getattr(owner, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get(
            "use_reentrant", True
        ):
            raise ValueError(
                "hia: gradient checkpointing must not be re-entrant, since a frozen host's inputs need no gradient and "
                "the adapter would get none; call model.gradient_checkpointing_enable()"
            )


def warn_if_pristine(adapter: HiAAdapter) -> None:
    """Warn where training would use running statistics that no data has touched."""
    encoder = adapter.encoder
    if not encoder.live_statistics and any(p.requires_grad for p in encoder.parameters()) and is_pristine(encoder):
        warnings.warn(
            "hia: the encoder's batch-norm statistics are a new encoder's (mean 0, variance 1) and running statistics "
            "don't move in training; call model.calibrate_encoder(images) with some of your images, load weights, or "
            "call model.set_batch_norm('batch')",
            stacklevel=3,
        )


def _is_rate(value: Any) -> bool:
    return type(value) is not bool and isinstance(value, numbers.Real) and 0 <= float(value) < math.inf


def parameter_groups(
    adapter: HiAAdapter, base: nn.Module, lr: float, encoder_lr_scale: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Group the trained parameters for an optimizer; see :meth:`hia.HiAModel.parameter_groups`."""
    for name, value in (("lr", lr), ("encoder_lr_scale", encoder_lr_scale), ("weight_decay", weight_decay)):
        if not _is_rate(value):
            raise ValueError(f"hia: {name} must be a finite number that is not negative, got {value!r}")
    queries = {id(layer.extractor.queries) for layer in adapter.layers.values()}
    seen: set[int] = set()
    groups: list[dict[str, Any]] = []
    rates = {"encoder": lr * encoder_lr_scale, "adapter": lr, "host": lr}
    for name, module in (("encoder", adapter.encoder), ("adapter", adapter), ("host", base)):
        own = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen.update(id(p) for p in own)
        matrices = [p for p in own if p.dim() > 1 and id(p) not in queries]
        others = [p for p in own if p.dim() <= 1 or id(p) in queries]
        for suffix, chosen, decay in (("", matrices, weight_decay), ("_no_decay", others, 0.0)):
            if chosen:
                groups.append({"name": name + suffix, "params": chosen, "lr": rates[name], "weight_decay": decay})
    return groups
