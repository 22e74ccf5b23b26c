"""Checks of shapes, dtypes, devices and choices, with one style of message for every op."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autocast

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES, torch.float64)
PIXELS = (torch.uint8, torch.uint16, *FLOATS)


def check_shapes(op: str, **specs: tuple[Tensor | None, str]) -> dict[str, int]:
    """Bind symbolic dims across arguments; a symbol must mean one size everywhere.

    Args:
        op: the op's name, for the message.
        specs: ``name=(tensor, "T D")``. A decimal symbol is a fixed size; an absent tensor is skipped.

    Returns:
        The size of every symbol.

    Raises:
        ValueError: a wrong rank, or a symbol bound to two sizes.
    """
    dims: dict[str, tuple[int, str]] = {}  # symbol -> (size, argument that fixed it)
    for name, (tensor, spec) in specs.items():
        if tensor is None:
            continue
        symbols, shape = spec.split(), tuple(tensor.shape)
        if len(shape) != len(symbols):
            raise ValueError(_wrong_shape(op, name, symbols, shape))
        for symbol, size in zip(symbols, shape, strict=True):
            if symbol.isdecimal():
                if size != int(symbol):
                    raise ValueError(_wrong_shape(op, name, symbols, shape))
                continue
            bound, owner = dims.setdefault(symbol, (size, name))
            if size != bound:
                raise ValueError(f"{_wrong_shape(op, name, symbols, shape)}; {symbol}={bound} is fixed by {owner}")
    return {symbol: size for symbol, (size, _) in dims.items()}


def _wrong_shape(op: str, name: str, symbols: list[str], shape: tuple[int, ...]) -> str:
    return f"hia::{op}: {name} must have shape [{', '.join(symbols)}], got {list(shape)}"


def check_dtypes(
    op: str, *, cast: bool = True, **specs: tuple[Tensor | None, torch.dtype | tuple[torch.dtype, ...]]
) -> None:
    """Check dtypes, each given as ``name=(tensor, allowed)``; an absent tensor is skipped.

    Args:
        op: the op's name, for the message.
        cast: autocast casts these arguments, so under it 16- and 32-bit floats may mix. False for statistics,
            which it leaves alone.
        specs: the tensors and what they may be.

    Raises:
        TypeError: the argument is no tensor, or its dtype is not among the allowed.
    """
    for name, (tensor, allowed) in specs.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"hia::{op}: {name} must be a tensor, got {type(tensor).__name__}")
        choices = allowed if isinstance(allowed, tuple) else (allowed,)
        if cast and autocast.is_enabled(tensor.device.type) and any(c in autocast.CASTABLE for c in choices):
            choices = (*choices, *autocast.CASTABLE)
        if tensor.dtype not in choices:
            expected = " or ".join(dict.fromkeys(str(choice).removeprefix("torch.") for choice in choices))
            raise TypeError(f"hia::{op}: {name} must be {expected}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """Check that all tensors are on the device of the first.

    Raises:
        ValueError: two devices.
    """
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = (name, tensor.device)
        elif tensor.device != first[1]:
            raise ValueError(f"hia::{op}: {name} must be on {first[1]} like {first[0]}, got {tensor.device}")


def check_choice(op: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Check that ``value`` is one of ``choices``.

    Raises:
        ValueError: it is none of them.
    """
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"hia::{op}: {name} must be {expected}, got {value!r}")
