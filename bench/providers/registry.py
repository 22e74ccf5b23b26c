"""The providers that are measured, and why one can't be where it can't."""

from __future__ import annotations

import importlib.util
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

import hia_kernels
from hia.layers.plan import Product
from hia_kernels.core import backend
from hia_kernels.info import op_backends

from ..workloads import CompositeEntry, ImageCase, Inputs, LayerCase, Workload, op_entry, references
from . import peers
from .bound import Bound, bind_function, bind_step
from .layers import TEXTBOOK, HiAStep, arguments_of, our_step, released_step
from .plain import replacing_ops
from .plain_encoder import PLAIN_ENCODERS, PlainEncoder

GRADIENT_MODES = ("backward", "both")
Weights = dict[str, Tensor] | None


class Provider(ABC):
    """One way to compute a workload.

    Attributes:
        name: of the provider.
        compiles: takes seconds to minutes before its first call.
    """

    name: str
    compiles = False

    @abstractmethod
    def serves(self, workload: Workload) -> bool:
        """Tell whether it makes sense at all; where it doesn't, there is no row."""

    def unavailable_reason(self, device: str, dtype: torch.dtype, workload: Workload, mode: str) -> str | None:
        """Say why it can't run here; None if it can, as far as one can tell without trying."""
        return None

    @abstractmethod
    def bind(self, workload: Workload, inputs: Inputs, weights: Weights, *, gradients: bool) -> Bound:
        """Do all that needn't be timed."""


class Ours(Provider):
    """``hia``: the ops as users call them; ``hia-<backend>`` with one forced."""

    def __init__(self, forced: str | None = None) -> None:
        self.name = "hia" if forced is None else f"hia-{forced}"
        self._forced = forced

    def serves(self, workload: Workload) -> bool:
        """Serve every workload; a forced backend those whose op has it."""
        if self._forced is None:
            return True
        table = backend.TABLES.get(workload.op)
        return table is not None and any(row.name == self._forced for row in table.backends)

    def unavailable_reason(self, device: str, dtype: torch.dtype, workload: Workload, mode: str) -> str | None:
        """Return what the op's table says about this machine."""
        if self._forced is None:
            return None
        return "; ".join(op_backends(backend.TABLES[workload.op])[self._forced]) or None

    def bind(self, workload: Workload, inputs: Inputs, weights: Weights, *, gradients: bool) -> Bound:
        """Bind the op, noting which backend served the call."""
        if weights is None:
            function = self._forcing(op_entry(workload.op).public)
            bound = bind_function(function, inputs, differentiable(workload), gradients=gradients)
            bound.notes = lambda: {"backend": hia_kernels.last_backend(workload.op)}
            return bound
        step = our_step(workload.case, weights)
        if not gradients:
            step.prepare(workload.op, inputs)
        return _our_bound(step, workload, inputs, gradients=gradients)

    def _forcing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self._forced is None:
            return function

        def forced(**arguments: Any) -> Any:
            with hia_kernels.use_backend(self._forced):
                return function(**arguments)

        return forced


class Textbook(Ours):
    """``textbook``, as records name it: our ops in the plan direct/direct, nothing folded, only features kept."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "textbook"

    def serves(self, workload: Workload) -> bool:
        """Serve composites with a layer."""
        return isinstance(workload.entry, CompositeEntry) and bool(workload.entry.parts)

    def bind(self, workload: Workload, inputs: Inputs, weights: Weights, *, gradients: bool) -> Bound:
        """Bind as ours."""
        step = our_step(workload.case, weights or {}, TEXTBOOK)
        return _our_bound(step, workload, inputs, gradients=gradients)


class Gemms(Provider):
    """``gemms``: no way to compute a composite but its limit: the bare matrix products of our plan's forms, on random
    numbers, one after the other; for ``adapter_layer`` behind our own encoder's run. No output, so none is checked.
    """

    name = "gemms"

    def serves(self, workload: Workload) -> bool:
        """Serve composites of inference with a layer."""
        entry = workload.entry
        return isinstance(entry, CompositeEntry) and bool(entry.parts) and not entry.trains

    def bind(self, workload: Workload, inputs: Inputs, weights: Weights, *, gradients: bool) -> Bound:
        """Allocate operands and results before; weights lie as linear layers have them."""
        step = our_step(workload.case, weights or {})
        step.prepare(workload.op, inputs)
        forms = step.forms(workload.op, inputs, gradients=False)
        products = [product for form in forms.values() for product in form["chosen"].products()]
        calls = [_bare_product(product, inputs["hidden"]) for product in products]
        encode = workload.op == "adapter_layer"

        def run() -> tuple[Tensor, ...]:
            outs = step.encode(inputs["images"], inputs["windows"]) if encode else ()
            for call in calls:
                outs = (call(),)
            return outs

        limit = "the bare products of our plan" + (" and our encoder" if encode else "")
        numbers = {"products": len(products), "gemm_flops": sum(product.flops for product in products)}
        return Bound(run, limit=limit, notes=lambda: numbers)


def _bare_product(product: Product, like: Tensor) -> Callable[[], Tensor]:
    """Return the call of [m, k] @ [k, n], ``batch`` times."""
    batch = product.batch
    left, right, out = (
        torch.randn(batch, *shape, device=like.device).to(like.dtype)
        for shape in ((product.m, product.k), (product.n, product.k), (product.m, product.n))
    )
    if batch == 1:
        left, right, out = left[0], right[0], out[0]
        return lambda: torch.mm(left, right.mT, out=out)
    return lambda: torch.bmm(left, right.mT, out=out)


def _our_bound(step: HiAStep, workload: Workload, inputs: Inputs, *, gradients: bool) -> Bound:
    """Bind a step, noting its forms by part, their FLOPs beside the textbook's, and what is kept of the images."""
    bound = bind_step(step, workload.op, arguments_of(step, workload.op, inputs), gradients=gradients)
    forms = step.forms(workload.op, inputs, gradients=gradients)
    if forms:
        notes: dict[str, Any] = {"forms": "/".join(form["chosen"].name for form in forms.values())}
        for kind, name in (("chosen", "plan_flops"), ("textbook", "textbook_flops")):
            notes[name] = round(sum(form[kind].flops for form in forms.values()))
        if step.caches:
            notes["kept_bytes"] = step.kept_bytes
        bound.notes = lambda: notes
    return bound


class Eager(Provider):
    """``eager``: the references, differentiated by autograd."""

    name = "eager"

    def serves(self, workload: Workload) -> bool:
        """Serve everything."""
        return True

    def bind(self, workload: Workload, inputs: Inputs, weights: Weights, *, gradients: bool) -> Bound:
        """Bind the reference; composites are the adapter's modules with the ops replaced."""
        if weights is None:
            reference = op_entry(workload.op).reference
            return bind_function(reference, inputs, differentiable(workload), gradients=gradients)
        return _plain_step(workload, inputs, weights, references(), gradients=gradients)


class Compiled(Provider):
    """``compile``: torch.compile of the same plain PyTorch; max-autotune on CUDA, frozen weights on the CPU."""

    name = "compile"
    compiles = True

    def serves(self, workload: Workload) -> bool:
        """Serve everything."""
        return True

    def unavailable_reason(self, device: str, dtype: torch.dtype, workload: Workload, mode: str) -> str | None:
        """Say what :func:`compiler_missing` does."""
        return compiler_missing(device)

    def bind(self, workload: Workload, inputs: Inputs, weights: Weights, *, gradients: bool) -> Bound:
        """Bind so that what compiling takes happens in the first call."""
        device = device_of(inputs)
        if weights is not None:
            wrap = compiling(device, gradients=gradients)
            plain = references(compilable=True)
            return _plain_step(workload, inputs, weights, plain, gradients=gradients, wrap=wrap)
        entry = op_entry(workload.op)
        function, parameters = entry.compilable_reference, entry.inputs.PARAMETERS
        if gradients:
            compiled = compiling(device, gradients=True)(function)
            return bind_function(compiled, inputs, differentiable(workload), gradients=True)
        module = _Frozen(function, {name: inputs[name] for name in parameters})
        arguments = {name: value for name, value in inputs.items() if name not in parameters}
        return bind_function(compiling(device, gradients=False)(module), arguments, (), gradients=False)


class Released(Provider):
    """``released``: our port of the released code's maths; ``released_compile``: compiled, with SDPA allowed."""

    def __init__(self, *, compiled: bool = False) -> None:
        self.name = "released_compile" if compiled else "released"
        self.compiles = compiled

    def serves(self, workload: Workload) -> bool:
        """Serve what that code has; composites have another mathematics and need the "released" preset."""
        return workload.level == "composite" or workload.op in peers.RELEASED

    def unavailable_reason(self, device: str, dtype: torch.dtype, workload: Workload, mode: str) -> str | None:
        """Refuse the other presets, whose maths is another, and encoders but ResNet-50."""
        case = workload.case
        if isinstance(case, ImageCase) and case.encoder != "resnet50":
            return "its encoder is ResNet-50"
        if workload.level == "composite" and isinstance(case, LayerCase) and case.preset != "released":
            return "its maths is that of the cases named 'released'"
        return compiler_missing(device) if self.compiles else None

    def bind(self, workload: Workload, inputs: Inputs, weights: Weights, *, gradients: bool) -> Bound:
        """Normalise pixels and put channels first before the timing."""
        wrap = compiling(device_of(inputs), gradients=gradients) if self.compiles else _unchanged
        if weights is None:
            function, prepare = peers.released_op(workload, sdpa=self.compiles)
            return bind_function(wrap(function), prepare(inputs), differentiable(workload), gradients=gradients)
        weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
        step = released_step(workload.case, weights, sdpa=self.compiles)
        arguments = arguments_of(step, workload.op, inputs)
        return bind_step(step, workload.op, arguments, gradients=gradients, run=wrap(getattr(step, workload.op)))


class Peer(Provider):
    """An attention of another library, a convolution as PyTorch users write it for speed, or the usual stem."""

    def __init__(self, peer: peers.Attention | peers.ChannelsLast | peers.EagerRgb) -> None:
        self.name, self._peer = peer.name, peer
        self.compiles = getattr(peer, "compiled", False)

    def serves(self, workload: Workload) -> bool:
        """Serve its ops."""
        return workload.op in self._peer.ops

    def unavailable_reason(self, device: str, dtype: torch.dtype, workload: Workload, mode: str) -> str | None:
        """Return the library's own limits."""
        if self.compiles and compiler_missing(device) is not None:
            return compiler_missing(device)
        return self._peer.unavailable_reason(device, dtype, workload, mode)

    def bind(self, workload: Workload, inputs: Inputs, weights: Weights, *, gradients: bool) -> Bound:
        """Fold weights and change layouts before the timing."""
        wrap = compiling(device_of(inputs), gradients=gradients) if self.compiles else _unchanged
        if weights is not None:
            run = wrap(self._peer.encoder(our_step(workload.case, weights)))
            arguments = self._peer.images(inputs, next(iter(weights.values())).dtype)
            return bind_function(run, arguments, (), gradients=False)
        function, arguments = self._peer.prepare(workload.op, inputs)
        wrt = differentiable(workload) if gradients else ()
        return bind_function(wrap(function), arguments, wrt, gradients=gradients)


class Plain(Provider):
    """``plain``, ``plain_channels_last``: the encoder's training step in plain modules, on our parameters."""

    def __init__(self, plain: PlainEncoder) -> None:
        self.name, self._plain = plain.name, plain

    def serves(self, workload: Workload) -> bool:
        """Serve its composite."""
        return workload.op in self._plain.ops

    def bind(self, workload: Workload, inputs: Inputs, weights: Weights, *, gradients: bool) -> Bound:
        """Stack and normalise pixels inside the timing, as ours are."""
        step = our_step(workload.case, {name: tensor.detach().clone() for name, tensor in (weights or {}).items()})
        run = partial(self._plain.encode, step)
        return bind_step(step, workload.op, dict(inputs), gradients=gradients, run=run)


def differentiable(workload: Workload) -> tuple[str, ...]:
    """List the arguments of an op that gradients are taken of."""
    return op_entry(workload.op).inputs.DIFFERENTIABLE


class _Frozen(nn.Module):
    """A function with its weights as a module's parameters, which is what freezing looks for."""

    def __init__(self, function: Callable[..., Any], weights: Inputs) -> None:
        super().__init__()
        self._function = function
        self._absent = {name: None for name, value in weights.items() if value is None}
        self._names = [name for name in weights if name not in self._absent]
        for name in self._names:
            self.register_parameter(f"fixed_{name}", nn.Parameter(weights[name], requires_grad=False))

    def forward(self, **arguments: Any) -> Any:
        fixed = {name: getattr(self, f"fixed_{name}") for name in self._names}
        return self._function(**arguments, **fixed, **self._absent)


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def device_of(inputs: Inputs) -> str:
    """Return "cpu" or "cuda"."""
    values = [item for value in inputs.values() for item in (value if isinstance(value, list | tuple) else [value])]
    return next(value.device.type for value in values if isinstance(value, Tensor))


def compiling(device: str, *, gradients: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return ``torch.compile`` as one would use it there.

    CUDA graphs, which "max-autotune" brings, are left out where gradients are taken: a kept graph is differentiated
    again and again, and they would overwrite it.
    """
    if device == "cuda":
        options: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs" if gradients else "max-autotune"}
    else:
        options = {} if gradients else {"options": {"freezing": True}}

    # the backward is timed alone, on a graph that is kept: its buffers can't be given away
    torch._functorch.config.donated_buffer = False
    return lambda function: torch.compile(function, dynamic=False, **options)


def compiler_missing(device: str) -> str | None:
    """Say why torch.compile can't make code for the device."""
    if device == "cuda":
        return None if importlib.util.find_spec("triton") else "torch.compile needs Triton, which is not installed"
    found = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return None if found else "torch.compile needs a C++ compiler, and none is installed"


def _plain_step(
    workload: Workload,
    inputs: Inputs,
    weights: dict[str, Tensor],
    functions: dict[str, Callable[..., Any]],
    *,
    gradients: bool,
    wrap: Callable[..., Any] = _unchanged,
) -> Bound:
    """Bind the adapter's modules with plain PyTorch in place of the registered ops, during every call."""
    step = our_step(workload.case, {name: tensor.detach().clone() for name, tensor in weights.items()}, TEXTBOOK)
    method = wrap(getattr(step, workload.op))

    def run(**arguments: Any) -> Any:
        with replacing_ops(functions):
            return method(**arguments)

    return bind_step(step, workload.op, dict(inputs), gradients=gradients, run=run)


def all_providers() -> dict[str, Provider]:
    """Return the providers by name, in the tables' order."""
    forced = sorted({row.name for table in backend.TABLES.values() for row in table.backends} - {"reference"})
    found: list[Provider] = [Ours(), *(Ours(name) for name in forced), Textbook(), Gemms(), Eager(), Compiled()]
    found += [Released(), Released(compiled=True)]
    found += [Plain(plain) for plain in PLAIN_ENCODERS]
    found += [Peer(peer) for peer in (*peers.ATTENTIONS, *peers.CONVOLUTIONS, peers.EagerRgb())]
    return {provider.name: provider for provider in found}
