"""The context that ``backward()`` was called from, for the threads that PyTorch runs gradients on.

Autograd runs the gradients of CUDA tensors on threads of its own, and those of compiled functions in a copy of the
caller's context. Newer PyTorch keeps the caller's context where both can find it; for one that doesn't (2.11), it is
kept here, in the same place.
"""

from __future__ import annotations

import contextvars
import ctypes
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.autograd.graph

_KEY = "context"  # as newer PyTorch names it
_STASH = "_stash_obj_in_tls"  # what it calls for that
_RUN_BACKWARD = "_engine_run_backward"  # what backward() and grad() call, on the caller's thread


def in_backward() -> bool:
    """Tell whether a backward pass is running this."""
    return torch._C._current_graph_task_id() != -1


def caller_of_backward(variable: contextvars.ContextVar[Any]) -> Any:
    """Return a variable's value where ``backward()`` was called; None if that can't be told."""
    if not in_backward():
        return None
    context = _kept()
    return None if context is None else context.get(variable)


def _kept() -> contextvars.Context | None:
    return torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None


def _stash(value: contextvars.Context | None) -> None:
    torch._C._stash_obj_in_tls(_KEY, value)


def _stash_counted(value: contextvars.Context | None) -> None:
    """Stash with a reference of its own, which PyTorch gives back later though it has taken none."""
    _take_reference(value)
    torch._C._stash_obj_in_tls(_KEY, value)


_take_reference = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi))


def _takes_no_reference() -> bool:
    """Tell whether this PyTorch counts no reference for what it stashes."""
    probe = contextvars.Context()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls(_KEY, probe)
    taken = sys.getrefcount(probe) - before
    if taken == 0:
        _take_reference(probe)
    return taken == 0


def _keeping(run_backward: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the caller's context while ``run_backward`` runs: its threads begin with what the caller's has kept."""

    stash = _stash_counted if _takes_no_reference() else _stash
    stash(None)

    @wraps(run_backward)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = _kept() if in_backward() else None  # a pass within a pass, as checkpoints make
        stash(contextvars.copy_context())
        try:
            return run_backward(*args, **kwargs)
        finally:
            stash(before)

    for function in (run, stash, _kept):
        _hide_from_compiler(function)
    return run


def _hide_from_compiler(function: Any) -> None:
    """Make torch.compile run the function as it runs PyTorch's own: ``torch.compiler.disable`` takes seconds here."""
    dynamo = torch._C._dynamo.eval_frame
    if hasattr(dynamo, "set_code_exec_strategy"):
        actions = dynamo._FrameAction
        strategy = dynamo._FrameExecStrategy(actions.SKIP, actions.DEFAULT)
        dynamo.set_code_exec_strategy(function.__code__, strategy)


def _keep_callers_context() -> None:
    """Have PyTorch keep the context of whoever calls ``backward()``, unless it does or is made otherwise."""
    run_backward = getattr(torch.autograd.graph, _RUN_BACKWARD, None)
    names = getattr(getattr(run_backward, "__code__", None), "co_names", None)
    if run_backward is None or names is None or _STASH in names:
        return
    keeping = _keeping(run_backward)
    for module in (torch.autograd, torch.autograd.graph):  # the former has imported its own name of it
        if getattr(module, _RUN_BACKWARD, None) is run_backward:
            setattr(module, _RUN_BACKWARD, keeping)


_keep_callers_context()
