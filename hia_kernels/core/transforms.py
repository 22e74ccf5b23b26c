"""Autograd of the ops, with what ``torch.library.register_autograd`` leaves out: torch.func, and forward-mode AD.

Its kernel serves ``backward``. Under ``torch.func.grad`` and what is made of it (``vjp``, ``jacrev``, ``vmap`` over
them) it raises an error that names no op, and of tangents it knows nothing: they would be lost without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from . import once

once.refuse_reload(globals())

_library = torch.library.Library("hia", "FRAGMENT")  # kept: what it holds goes with it


def _refuse_tangents(op: str, args: Iterable[Any]) -> None:
    """Raise if an argument carries a tangent; only called inside a level of forward-mode AD."""
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"hia::{op}: forward-mode AD (torch.func.jvp, jacfwd, dual tensors) is not implemented;"
                " use reverse mode: backward, torch.func.vjp or jacrev"
            )


def _below_autograd(overload: torch._ops.OpOverload, keyset: Any, args: Iterable[Any]) -> Any:
    """Call what is registered behind autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _kernel_under_transforms(
    overload: torch._ops.OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None] | None
) -> Callable[..., Any]:
    """Return the autograd kernel for arguments of torch.func: differentiates at the innermost of its levels."""

    def forward(ctx: Any, *args: Any) -> Any:
        given, keyset = args[:-1], args[-1]
        with torch.enable_grad(), _set_fwd_grad_enabled(True):  # turned off by apply, for outer levels too
            output = _below_autograd(overload, keyset, given)
        if setup_context is not None:
            setup_context(ctx, tuple(_filled(overload, given)), output)
        return output

    def run(ctx: Any, *grads: Any) -> Any:
        wanted = ctx.needs_input_grad
        ctx.needs_input_grad = wanted[:-1]  # the last is the keyset's
        try:
            found = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = wanted
        return (*found, None) if isinstance(found, tuple) else (found, None)

    name = f"TransformedBackwardFor_hia_{overload._opname}"
    function: Any = type(
        name, (_SingleLevelFunction,), {"forward": staticmethod(forward), "backward": staticmethod(run)}
    )

    def kernel(keyset: Any, *args: Any) -> Any:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return _below_autograd(overload, keyset, args)
        with enable_single_level_autograd_function():
            return function.apply(*args, keyset)

    return kernel


def _filled(overload: torch._ops.OpOverload, args: Iterable[Any]) -> list[Any]:
    """Return the arguments with the defaults that the dispatcher leaves out."""
    given = list(args)
    return [*given, *(argument.default_value for argument in overload._schema.arguments[len(given) :])]


def register(
    op: str,
    overload: torch._ops.OpOverload,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Give an overload of the namespace ``hia`` its gradients.

    Args:
        op: the name that errors have.
        overload: functional, of tensors that are no lists.
        backward: as :func:`torch.library.register_autograd` takes it.
        setup_context: likewise.
    """
    plain = make_autograd_impl(overload, Info(backward, setup_context))
    transformed = _kernel_under_transforms(overload, backward, setup_context)

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, args)
        if torch._C._are_functorch_transforms_active():
            return transformed(keyset, *args)
        return plain(keyset, *args)

    _library.impl(overload._opname, kernel, "Autograd", with_keyset=True)


def register_as_first(op: str, overload: torch._ops.OpOverload, other: torch._ops.OpOverload) -> None:
    """Give an overload the gradients of another one, which returns the same result first.

    Args:
        op: the name that errors have.
        overload: functional, of tensors that are no lists.
        other: of the same arguments; called instead where gradients are recorded.
    """

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return other(*_filled(overload, args))[0]
        return _below_autograd(overload, keyset, args)

    _library.impl(overload._opname, kernel, "Autograd", with_keyset=True)


def register_without(op: str, overload: torch._ops.OpOverload, instead: str) -> None:
    """Make an overload refuse what it would lose: gradients, at any level of torch.func, and tangents.

    It also refuses to write to a negative view, as that of a conjugate's imaginary part.

    Args:
        op: the name that errors have.
        overload: without gradients.
        instead: the op that has them.
    """
    names = [argument.name for argument in overload._schema.arguments]
    infos = enumerate(argument.alias_info for argument in overload._schema.arguments)
    written = [place for place, info in infos if info is not None and info.is_write]

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            given = zip(names, args, strict=False)  # the dispatcher leaves defaults out
            name = next(name for name, x in given if isinstance(x, Tensor) and x.requires_grad)
            raise RuntimeError(
                f"hia::{op}: {name} must not be part of a gradient graph, got requires_grad=True;"
                f" use {instead} when training"
            )
        for place in written:
            if isinstance(args[place], Tensor) and args[place].is_neg():  # PyTorch's own fallback for it fails inside
                raise ValueError(f"hia::{op}: {names[place]} must not be a negative view; call resolve_neg() first")
        return _below_autograd(overload, keyset, args)

    _library.impl(overload._opname, kernel, "Autograd", with_keyset=True)
