"""Modules whose weights may be elsewhere between their calls.

FSDP2 gathers a module's shards when it is called and frees them afterwards; accelerate's offloading loads and unloads
weights in the same way. Both see calls alone: of a module whose weights are read from outside they know nothing. So
the encoder, a layer, its extractor and its injection, and the shared projection are units: all that reads a unit's
weights runs inside a call of it, be it its forward or another function of it that :meth:`Unit.inside` calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")


class Unit(nn.Module):
    """A module that can be sharded or offloaded as a whole."""

    def inside(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run a function that reads this module's weights as a call of the module, with its hooks around it.

        Args:
            function: what runs in the place of ``forward``.
            args: of the function.
            kwargs: of the function.

        Returns:
            What the function returns.
        """
        return self(*args, inside=function, **kwargs)

    def check_in_place(self, action: str) -> None:
        """Refuse an action whose result is kept beside weights that are at hand in calls alone.

        Raises:
            NotImplementedError: a weight is sharded or offloaded.
        """
        for name, parameter in self.named_parameters():
            if parameter.device.type == "meta" or is_sharded(parameter):
                where = "sharded" if is_sharded(parameter) else "on the meta device"
                raise NotImplementedError(
                    f"hia: {action} must have weights that stay in place between calls, got {name} {where}; modules "
                    f"that are sharded or offloaded run without folded weights"
                )


def is_sharded(parameter: Tensor) -> bool:
    """Tell whether a parameter is FSDP2's or DeepSpeed's (ZeRO-3), of which each rank holds a part."""
    return torch.distributed.is_available() and (hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id"))


def unit_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a unit's ``forward``, so that :meth:`Unit.inside` can run another function in its place."""

    @functools.wraps(forward)
    def call(self: Unit, *args: Any, inside: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) if inside is None else inside(*args, **kwargs)

    return call
