"""Checks of shapes, dtypes, devices and choices, with one style of message for every op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import expect_true

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES, torch.float64)
PIXELS = (torch.uint8, torch.uint16, *FLOATS)
INDEX_DTYPES = (torch.int32, torch.int64)  # uint8 and bool would be masks to PyTorch

# what an argument's dtype may be, by that of another
_Choices = Mapping[torch.dtype | None, tuple[torch.dtype, ...]]
SAME: _Choices = {dtype: (dtype,) for dtype in FLOATS}
STATISTICS: _Choices = {dtype: (torch.float64 if dtype == torch.float64 else torch.float32,) for dtype in FLOATS}

_STRIDED = torch.strided


@dataclass(frozen=True)
class Arg:
    """The requirements on one tensor argument.

    Attributes:
        shape: one symbol for each dimension, separated by blanks: "T H D". A symbol stands for the same size in all
            arguments, a decimal number for itself.
        dtypes: the allowed dtypes; if they depend on another argument, a mapping from that argument's dtype.
        of: the name of that other argument, which comes earlier.
        optional: whether the argument may be None.
    """

    shape: str
    dtypes: tuple[torch.dtype, ...] | _Choices
    of: str | None = None
    optional: bool = False

    def choices(self) -> _Choices:
        """Return the allowed dtypes by the dtype of ``of``, or under None if they depend on no other argument."""
        return {None: self.dtypes} if isinstance(self.dtypes, tuple) else self.dtypes


def like(of: str, shape: str, *, optional: bool = False) -> Arg:
    """Require the dtype of the argument ``of``."""
    return Arg(shape, SAME, of, optional)


def statistics(of: str, shape: str, *, optional: bool = False) -> Arg:
    """Require fp32, or fp64 if the argument ``of`` is fp64."""
    return Arg(shape, STATISTICS, of, optional)


class Contract:
    """The requirements of an op on its tensors, checked in every call: types, layouts, dtypes, shapes, one device.

    Nothing is kept from call to call, so no change of a stride, a dtype or a device goes unseen.
    """

    def __init__(self, op: str, **tensors: Arg) -> None:
        """Give ``op``'s tensors, by name, in the order in which they fix the sizes."""
        self.op = op
        self._rows = [
            (name, tuple(arg.shape.split()), arg.choices(), arg.of, arg.optional) for name, arg in tensors.items()
        ]
        symbols = {symbol for _, symbols, *_ in self._rows for symbol in symbols}
        self._fixed = {symbol: int(symbol) for symbol in symbols if symbol.isdecimal()}

    def __call__(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        """Check the arguments of a call.

        Args:
            arguments: by name; others than the contract's are not looked at.

        Returns:
            The size of every symbol.

        Raises:
            TypeError: no tensor, no dense one, or another dtype. ValueError: another shape, or two devices.
        """
        sizes = self._fixed.copy()
        device = None
        for name, symbols, choices, of, optional in self._rows:
            tensor = arguments[name]
            if tensor is None and optional:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"hia::{self.op}: {name} must be a tensor, got {type(tensor).__name__}")
            if tensor.layout is not _STRIDED:
                raise TypeError(f"hia::{self.op}: {name} must be a dense tensor, got {_short(tensor.layout)}")
            allowed = choices[None if of is None else arguments[of].dtype]
            if tensor.dtype not in allowed:
                raise TypeError(self._wrong_dtype(name, allowed, of, arguments))
            shape = tensor.shape
            if len(shape) != len(symbols):
                raise ValueError(self._wrong_shape(name, symbols, shape))
            for symbol, size in zip(symbols, shape, strict=True):
                bound = sizes.setdefault(symbol, size)
                if bound is not size and not expect_true(bound == size):  # of sizes that tracing doesn't know, later
                    raise ValueError(self._wrong_shape(name, symbols, shape) + self._owner(symbol, arguments))
            if device is None:
                device, first = tensor.device, name
            elif tensor.device != device:
                raise ValueError(f"hia::{self.op}: {name} must be on {device} like {first}, got {tensor.device}")
        return sizes

    def _wrong_dtype(
        self, name: str, allowed: tuple[torch.dtype, ...], of: str | None, arguments: Mapping[str, Any]
    ) -> str:
        expected = " or ".join(_short(choice) for choice in dict.fromkeys(allowed))
        if of is not None:
            other = arguments[of].dtype
            expected += f" like {of}" if allowed == (other,) else f" beside {of} in {_short(other)}"
        return f"hia::{self.op}: {name} must be {expected}, got {_short(arguments[name].dtype)}"

    def _wrong_shape(self, name: str, symbols: tuple[str, ...], shape: torch.Size) -> str:
        return f"hia::{self.op}: {name} must have shape [{', '.join(symbols)}], got {list(shape)}"

    def _owner(self, symbol: str, arguments: Mapping[str, Any]) -> str:
        """Say which argument fixed a symbol's size."""
        if symbol in self._fixed:
            return ""
        name, symbols = next(
            (name, symbols) for name, symbols, *_ in self._rows if symbol in symbols and arguments[name] is not None
        )
        return f"; {symbol}={arguments[name].shape[symbols.index(symbol)]} is fixed by {name}"


def _short(name: torch.dtype | torch.layout) -> str:
    return str(name).removeprefix("torch.")


def check_choice(op: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Check that ``value`` is one of ``choices``.

    Raises:
        ValueError: it is none of them.
    """
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"hia::{op}: {name} must be {expected}, got {value!r}")


def check_not_negative(op: str, name: str, value: int) -> None:
    """Check a count.

    Raises:
        ValueError: it is less than 0.
    """
    if not expect_true(value >= 0):
        raise ValueError(f"hia::{op}: {name} must not be negative, got {value}")
