"""Refusal of what would register operators a second time: PyTorch takes an operator once in a process."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch

_MARK = "_is_loaded"


def refuse_reload(module: MutableMapping[str, Any]) -> None:
    """Mark a module, or raise if it is marked: :func:`importlib.reload` runs its body again, in the same globals.

    For the first line of a module that holds what operators keep: a second run would leave them with what the first
    made, and everybody else with something new.

    Args:
        module: its ``globals()``.

    Raises:
        RuntimeError: its body runs for the second time.
    """
    if _MARK in module:
        raise RuntimeError(_message(module["__name__"]))
    module[_MARK] = True


def define(name: str, schema: str, **options: Any) -> None:
    """Declare an operator, as :func:`torch.library.define` does.

    Args:
        name: with its namespace.
        schema: of its arguments and results.
        options: as there.

    Raises:
        RuntimeError: this process has it already.
    """
    namespace, _, function = name.partition("::")
    if hasattr(getattr(torch.ops, namespace), function):
        raise RuntimeError(_message(name))
    torch.library.define(name, schema, **options)


def _message(what: str) -> str:
    return (
        f"hia_kernels: {what} must be loaded once in a process, got a second time (importlib.reload, a notebook's"
        " autoreload, an import after sys.modules was emptied, or a second copy of the package); start a new process,"
        " in a notebook a new kernel, to load changed sources"
    )
