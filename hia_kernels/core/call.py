"""Calls of the ops from Python: what a schema would convert without a word, or refuse in its own, is named here."""

from __future__ import annotations

import numbers
import operator
import re
import sys
from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from . import once

once.refuse_reload(globals())

_Converter = Callable[[str, str, Any], Any]
_REFUSED = re.compile(r"Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(.+?)'")
_EXPECTED = {"Tensor": "a tensor", "Optional[Tensor]": "a tensor or None"}


def _type_error(op: str, name: str, expected: str, value: Any) -> TypeError:
    found = "a tensor; .item() would wait for the device" if isinstance(value, Tensor) else type(value).__name__
    return TypeError(f"hia::{op}: {name} must be {expected}, got {found}")


def _integer(op: str, name: str, value: Any) -> Any:
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool | Tensor):
        raise _type_error(op, name, "an int", value)
    try:
        return operator.index(value)  # NumPy's too
    except TypeError:  # an array's names nothing
        raise _type_error(op, name, "an int", value) from None


def _integers(op: str, name: str, value: Any) -> list[Any]:
    if isinstance(value, Tensor | str | bytes | Mapping | Set) or not hasattr(value, "__iter__"):
        raise _type_error(op, name, "a sequence of ints", value)
    return [_integer(op, f"{name}[{position}]", one) for position, one in enumerate(value)]


def _number(op: str, name: str, value: Any) -> Any:
    if type(value) is float or isinstance(value, torch.SymFloat | torch.SymInt):
        return value
    if isinstance(value, bool | Tensor) or not isinstance(value, numbers.Real):
        raise _type_error(op, name, "a number", value)
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"hia::{op}: {name} must fit in a float, got more than {sys.float_info.max:.1e}") from None


def _string(op: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _type_error(op, name, "a string", value)
    return value


def _flag(op: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _type_error(op, name, "a bool", value)
    return value


def _dtype(op: str, name: str, value: Any) -> torch.dtype | None:
    if value is not None and not isinstance(value, torch.dtype):
        raise _type_error(op, name, "a torch.dtype or None", value)
    return value


_CONVERTERS: dict[str, _Converter] = {
    "int": _integer,
    "List[int]": _integers,
    "float": _number,
    "bool": _flag,
    "str": _string,
    "Optional[ScalarType]": _dtype,
}
# by name: the overload, and position, name and converter of the arguments that are no tensors
_declared: dict[str, tuple[torch._ops.OpOverload, tuple[tuple[int, str, _Converter], ...]]] = {}


def declare(name: str) -> None:
    """Make ``hia::name`` known to :func:`call`."""
    overload = getattr(torch.ops.hia, name).default
    arguments = enumerate(overload._schema.arguments)
    convert = ((place, one.name, _CONVERTERS.get(str(one.real_type))) for place, one in arguments)
    _declared[name] = overload, tuple((place, one, found) for place, one, found in convert if found is not None)


def call(name: str, *args: Any) -> Any:
    """Call ``hia::name``.

    A schema takes a bool for an int, and a tensor for a number, which makes the host wait for the device; what it
    refuses is a RuntimeError of many lines. PyTorch's dispatcher answers nested tensors, which have no kernel of ours.

    Raises:
        TypeError: an argument has another type than its schema says, or is a nested tensor. ValueError: an int or a
            number that 64 bits can't hold. Everything that the op itself raises.
    """
    overload, converters = _declared[name]
    for place, argument, convert in converters:
        value = convert(name, argument, args[place])
        if value is not args[place]:
            args = (*args[:place], value, *args[place + 1 :])
    try:
        return overload(*args)
    except RuntimeError as error:
        nested = next((place for place, x in enumerate(args) if isinstance(x, Tensor) and x.is_nested), None)
        if nested is not None:
            argument = overload._schema.arguments[nested].name
            raise TypeError(f"hia::{name}: {argument} must be a dense tensor, got a nested one") from None
        refused = _REFUSED.search(str(error))
        if refused is None or not str(error).startswith(f"hia::{name}("):
            raise
        expected, argument, found = refused.groups()
        # what :func:`_integer` has passed, here or in a list
        if (expected, found) in (("int", "int"), ("List[int]", "list")):
            raise ValueError(f"hia::{name}: {argument} must fit in 64 bits, got more") from None
        message = f"hia::{name}: {argument} must be {_EXPECTED.get(expected, expected)}, got {found}"
    raise TypeError(message)
