"""Autocast for the ops: compute tensors follow the active autocast dtype, statistics stay as they are.

``torch.library.register_autocast`` casts every floating argument to one dtype fixed at registration. The ops
need neither: fp32 scales, shifts and norm weights must stay fp32, and fp16 and bf16 are both in use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CPU, _CUDA = DEVICES = ("cpu", "cuda")  # where the ops know autocast
CASTABLE = (torch.float32, torch.float16, torch.bfloat16)

KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def is_anywhere_enabled() -> bool:
    """Tell whether code runs under autocast for any device that the ops serve."""
    return torch.is_autocast_enabled(_CPU) or torch.is_autocast_enabled(_CUDA)  # every call asks: no loop


def is_enabled(device_type: str) -> bool:
    """Tell whether the ops' arguments on that device type are cast; meta tensors, for one, have no autocast."""
    return device_type in DEVICES and torch.is_autocast_enabled(device_type)


def register_autocast(overload: torch._ops.OpOverload, cast: tuple[str, ...]) -> None:
    """Cast the named arguments of ``overload`` to the autocast dtype under autocast; float64 is left alone."""
    names = [argument.name for argument in overload._schema.arguments]
    positions = [names.index(name) for name in cast]
    for device in DEVICES:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

        def kernel(*args: Any, _device: str = device, _keys: Any = keys) -> Any:
            dtype = torch.get_autocast_dtype(_device)
            values = list(args)
            for position in positions:
                value = values[position] if position < len(values) else None
                if isinstance(value, Tensor) and value.dtype in CASTABLE:
                    values[position] = value.to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(_keys):
                return overload(*values)

        torch.library.impl(overload._schema.name, f"Autocast{device.upper()}")(kernel)
