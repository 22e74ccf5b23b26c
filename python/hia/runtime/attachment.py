"""Facts that attaching an adapter needs of a host: its own parameters, and where each layer lives."""

from __future__ import annotations

import torch
from torch import nn

from ..config import HiAConfig
from ..hosts import LlamaHost
from ..layers.adapter import HiAAdapter


def is_tuned(base: nn.Module) -> bool:
    """Tell whether PEFT has put layers of its own into the host."""
    return any(getattr(module, "adapter_layer_names", ()) for module in base.modules())


def own_parameters(base: nn.Module) -> list[nn.Parameter]:
    """List the host's parameters without those of PEFT's adapters in it: its layers name theirs."""
    foreign: set[int] = set()
    for module in base.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            adapters = getattr(module, name, None)
            if isinstance(adapters, (nn.Module, nn.ParameterDict)):
                foreign.update(id(parameter) for parameter in adapters.parameters())
    return [parameter for parameter in base.parameters() if id(parameter) not in foreign]


def layer_device(layer: nn.Module) -> torch.device:
    """Find where a layer computes; accelerate's offloading keeps its weights elsewhere."""
    execution = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    if execution is not None:
        return torch.device(execution if not isinstance(execution, int) else f"cuda:{execution}")
    return next(layer.parameters()).device


def adapter_for(host: LlamaHost, config: HiAConfig) -> HiAAdapter:
    """Build the adapter in the host's dtype, each HiA layer beside its decoder layer, the encoder beside the first."""
    devices = {index: layer_device(host.layers[index]) for index in config.layer_indices}
    first = devices[config.layer_indices[0]]
    dtype = next(p.dtype for p in host.layers[config.layer_indices[0]].parameters() if p.is_floating_point())
    with torch.device(first):
        adapter = HiAAdapter(config).to(dtype)
    for index, device in devices.items():
        adapter.layer(index).to(device)
    return adapter
