"""The hosts: the only files that know a host's attribute paths."""

from __future__ import annotations

from typing import Any

from torch import nn

from .llama import LlamaHost
from .llava import LlavaHost

HOSTS: tuple[type[LlamaHost], ...] = (LlavaHost, LlamaHost)


def unwrap(model: Any) -> Any:
    """Return the transformers model inside PEFT's wrappers."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def find_host(model: nn.Module) -> LlamaHost:
    """Find out how to reach into this model.

    Raises:
        TypeError: no host is known for it.
    """
    inner = unwrap(model)
    for host in HOSTS:
        if host.accepts(inner):
            return host(inner)
    known = ", ".join(host.class_name for host in HOSTS)
    raise TypeError(f"hia: base must be one of {known} (or one of them in a PEFT model), got {type(inner).__name__}")


__all__ = ["HOSTS", "LlamaHost", "LlavaHost", "find_host", "unwrap"]
