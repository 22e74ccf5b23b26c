"""Registration of the ops of the namespace ``hia``: the schema here in Python, one kernel that asks the op's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch.autograd.graph import increment_version

from . import autocast, call, once, overlap, transforms, varlen
from .backend import BackendTable, block_backend, use_backend

once.refuse_reload(globals())

_checks: dict[str, Callable[[Mapping[str, Any]], Any]] = {}


def define(name: str, schema: str, check: Callable[[Mapping[str, Any]], Any]) -> None:
    """Declare ``hia::name``; implementations come separately, so importing needs no compiler.

    Args:
        name: of the function.
        schema: its arguments and results.
        check: raises where the arguments, by name, are not what the op's contract says; runs once in every call, be it
            of real tensors (:func:`implement`) or of fake ones (:func:`fake`). It does not look at values.
    """
    once.define(f"hia::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    call.declare(name)
    _checks[name] = _with_mask(name, check) if "output_mask" in _signature(name)[0] else check


def _with_mask(name: str, check: Callable[[Mapping[str, Any]], Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Return a check that also wants one entry of ``output_mask`` for each gradient."""
    gradients = len(overload(name)._schema.returns)

    def run(arguments: Mapping[str, Any]) -> None:
        check(arguments)
        if len(arguments["output_mask"]) != gradients:
            raise ValueError(
                f"hia::{name}: output_mask must have {gradients} entries, got {len(arguments['output_mask'])}"
            )

    return run


@cache
def _signature(name: str) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Return names and defaults of the arguments of ``hia::name``."""
    arguments = overload(name)._schema.arguments
    return tuple(argument.name for argument in arguments), tuple(argument.default_value for argument in arguments)


def bind(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the arguments of a call of ``hia::name`` by the names of its schema, defaults filled in."""
    names, defaults = _signature(name)
    if len(args) < len(names):  # the dispatcher leaves defaults out
        args = (*args, *defaults[len(args) :])
    arguments = dict(zip(names, args, strict=True))
    if kwargs:
        arguments.update(kwargs)
    return arguments


def implement(name: str, table: BackendTable, values: Callable[..., None] | None = None) -> None:
    """Serve ``hia::name`` on every device from the table.

    Args:
        name: the op's function.
        table: its backends.
        values: checks values, which fake tensors don't have; runs before the backend is chosen, with the op's name
            and the arguments by theirs.
    """
    check, written, indices = _checks[name], _written(name), _indices(name)

    def run(*args: Any) -> Any:
        arguments = bind(name, args)
        check(arguments)
        given = args = tuple(arguments.values())
        for position, argument in indices:
            args = varlen.with_index(name, args, position, argument)
        for one in written:
            one.check_writable(args)
            args = one.apart(args)
        if args is not given:
            arguments = bind(name, args)
        if values is not None:
            values(name, **arguments)
        function = table.select(name, arguments)
        if not autocast.is_anywhere_enabled():
            out = function(*args)
        else:  # what the op was given is in the right dtype; a backward run in the region must not be cast again
            with torch._C._ExcludeDispatchKeyGuard(autocast.KEYS):
                out = function(*args)
        for one in written:  # nothing else tells autograd: the dispatcher doesn't, and kernels write to addresses
            increment_version(args[one.position])
        return out

    torch.library.impl(f"hia::{name}", "default")(run)


def fake(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the fake implementation of ``hia::name``, for each of the names."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            _fake(name, function)
        return function

    return register


def _fake(name: str, function: Callable[..., Any]) -> None:
    check = _checks[name]

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = bind(name, args, kwargs)
        check(arguments)
        return function(*arguments.values())

    torch.library.register_fake(f"hia::{name}")(run)


def _written(name: str) -> tuple[overlap.Written, ...]:
    """Return the arguments that ``hia::name`` writes to."""
    arguments = list(enumerate(overload(name)._schema.arguments))
    tensors = [place for place, one in arguments if "Tensor" in str(one.type)]
    return tuple(
        overlap.Written(name, one.name, place, tuple(other for other in tensors if other != place), "packed" in name)
        for place, one in arguments
        if one.alias_info is not None and one.alias_info.is_write
    )


def _indices(name: str) -> tuple[tuple[int, str], ...]:
    """Return the positions and names of the arguments that kernels read as indices."""
    arguments = enumerate(overload(name)._schema.arguments)
    return tuple((place, one.name) for place, one in arguments if one.name in varlen.INDICES)


def packing_unsupported_reasons(device_type: str) -> list[str]:
    """Return why weights packed beforehand can't be used in this context, whoever serves; empty if they can."""
    if torch.compiler.is_compiling():  # first: what else is asked can't be traced
        return ["torch.compile is tracing"]
    return ["autocast is on"] if autocast.is_enabled(device_type) else []


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give ``hia::name`` gradients, by what its forward's ``use_backend`` block forced if ``backward`` is in none.

    Args:
        name: the op's function.
        backward: as :func:`torch.library.register_autograd` takes it.
        setup_context: likewise.
    """

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.forced_backend = block_backend()
        setup_context(ctx, inputs, output)

    def run(ctx: Any, *grads: Any) -> Any:
        if ctx.forced_backend is None or block_backend() is not None:
            return backward(ctx, *grads)
        with use_backend(ctx.forced_backend):
            return backward(ctx, *grads)

    transforms.register(name, overload(name), run, setup)


def differentiate_as_first(name: str, other: str) -> None:
    """Give ``hia::name`` the gradients of ``hia::other``, which takes the same arguments and returns its result first.

    ``hia::other`` is called in its place whenever gradients are recorded.
    """
    transforms.register_as_first(name, overload(name), overload(other))


def refuse_gradients(name: str, instead: str) -> None:
    """Make recording gradients of ``hia::name`` an error that names the op which has them."""
    transforms.register_without(name, overload(name), instead)


def refuse_double_backward(op: str, name: str) -> None:
    """Make differentiating the backward op ``hia::name`` an error: no fused backward could serve it."""

    def refuse(_ctx: Any, *_grads: Any) -> None:
        raise NotImplementedError(f"hia::{op}: gradients of gradients are not implemented; use create_graph=False")

    transforms.register(op, overload(name), refuse)


def overload(name: str) -> torch._ops.OpOverload:
    """Return ``torch.ops.hia.<name>.default``."""
    return getattr(torch.ops.hia, name).default
