"""How an op of the namespace ``hia`` is registered: the schema here in Python, one kernel that asks its table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import autocast
from .backend import BackendTable


def define(name: str, schema: str) -> None:
    """Declare ``hia::name``; implementations come separately, so importing needs no compiler."""
    torch.library.define(f"hia::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))


def implement(name: str, table: BackendTable, check: Callable[..., None] | None = None) -> None:
    """Serve ``hia::name`` on every device from the table.

    Args:
        name: the op's function.
        table: its backends.
        check: looks at values, which fake tensors don't have; runs before the backend is chosen.
    """

    def run(*args: Any) -> Any:
        if check is not None:
            check(*args)
        function = table.select(name, *args)
        if not autocast.is_anywhere_enabled():
            return function(*args)
        # what the op was given is in the right dtype; a backward run inside the region must not be cast again
        with torch._C._ExcludeDispatchKeyGuard(autocast.KEYS):
            return function(*args)

    torch.library.impl(f"hia::{name}", "default")(run)


def refuse_double_backward(op: str, name: str) -> None:
    """Make differentiating the backward op ``hia::name`` an error: no fused backward could serve it."""

    def refuse(_ctx: Any, *_grads: Any) -> None:
        raise NotImplementedError(f"hia::{op}: gradients of gradients are not implemented; use create_graph=False")

    torch.library.register_autograd(f"hia::{name}", refuse)


def overload(name: str) -> torch._ops.OpOverload:
    """``torch.ops.hia.<name>.default``."""
    return getattr(torch.ops.hia, name).default
