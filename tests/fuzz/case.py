"""One drawn call: plain values, from which the same tensors are made again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.subjects import SUBJECTS, Subject
from tests.inputs import Inputs, module_of

AROUND = 3  # elements before a padded row, and after
NAN, INF = float("nan"), float("inf")
INDICES = ("row_idx", "cu_seqlens_q", "cu_seqlens_k")


@dataclass(frozen=True)
class Case:
    """One call. ``repr`` is Python that makes it again.

    Attributes:
        function: a key of :data:`SUBJECTS`.
        backend: that is forced, or "auto".
        dtype: of the tensors, by name.
        shape: options of the op's ``inputs.Shape``, dtypes by name.
        options: arguments that are given as they are, beside those that the shape decides.
        seed: of the random numbers.
        values: by argument, what is made of its random numbers: a key of :data:`VALUES`.
        layouts: by argument, how it lies in memory: a key of :data:`LAYOUTS`.
        index: of row indices and lengths: "usual", "other" (the other integer), "strided".
        gradients: arguments to differentiate in.
        dout: how gradients arrive: "drawn", "transposed" or "summed" (of stride 0).
        autocast: a dtype by name; "" is off.
        threads: of PyTorch.
        mutation: an argument and what is wrong with it; the call must raise. None: the call is valid.
        raw: call ``torch.ops.hia`` instead of the public function.
    """

    function: str
    backend: str
    dtype: str = "float32"
    shape: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    values: dict[str, str] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    index: str = "usual"
    gradients: tuple[str, ...] = ()
    dout: str = "drawn"
    autocast: str = ""
    threads: int = 1
    mutation: tuple[str, str] | None = None
    raw: bool = False

    def __repr__(self) -> str:
        parts = []
        for one in fields(self):
            value = getattr(self, one.name)
            default = one.default_factory() if one.default_factory is not MISSING else one.default
            if value != default:
                parts.append(f"{one.name}={value!r}")
        return f"Case({', '.join(parts)})"

    @property
    def subject(self) -> Subject:
        """Return the function's entry."""
        return SUBJECTS[self.function]

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the dtype that is tested."""
        return getattr(torch, self.autocast or self.dtype)

    def program(self) -> str:
        """Return Python that runs the call again, from the root of the checkout."""
        return f"from tests.fuzz.check import check\nfrom tests.fuzz.case import Case\n\ncheck({self!r})"

    def arguments(self) -> Inputs:
        """Make the arguments, by name."""
        module = module_of(self.subject.op)
        shape = {name: _dtype_or(value) for name, value in self.shape.items()}
        drawn = module.make_inputs(module.Shape(**shape), getattr(torch, self.dtype), "cpu", self.seed)
        inputs = {**drawn, **{name: _dtype_or(value) for name, value in self.options.items()}}
        if self.options.get("pad_rows") is False and inputs["residual"] is not None:
            rows = (inputs["x"].shape[1] - self.shape["kernel"]) // self.shape["stride"] + 1
            inputs["residual"] = inputs["residual"][:, :rows].contiguous()
        for name, how in self.values.items():
            if isinstance(inputs[name], Tensor):
                inputs[name] = VALUES[how](inputs[name], torch.Generator().manual_seed(self.seed))
        for name, x in inputs.items():
            if name in INDICES and x is not None:
                inputs[name] = index_as(x, self.index)
        for name, how in self.layouts.items():
            if isinstance(inputs[name], Tensor):
                inputs[name] = LAYOUTS[how](inputs[name])
        return inputs


def _dtype_or(value: Any) -> Any:
    """Return the dtype of that name, or the value."""
    if isinstance(value, (list, tuple)):
        return tuple(_dtype_or(one) for one in value) if not isinstance(value, list) else value
    found = getattr(torch, value, None) if isinstance(value, str) else None
    return found if isinstance(found, torch.dtype) else value


def index_as(x: Tensor, how: str) -> Tensor:
    """Give an index another integer, or other strides."""
    if how == "other":
        return x.to(torch.int32 if x.dtype == torch.int64 else torch.int64)
    return every_other(x) if how == "strided" else x


def _filled(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return memory in which every element would show."""
    fill = NAN if like.is_floating_point() else torch.iinfo(like.dtype).max
    return torch.empty(shape, dtype=like.dtype).fill_(fill)


def every_other(x: Tensor) -> Tensor:
    """Put ``x`` between elements of something else."""
    return _filled((*x.shape[:-1], 2 * x.shape[-1] + 1), x)[..., 1::2].copy_(x)


def padded(x: Tensor) -> Tensor:
    """Put ``x`` into longer rows, at an odd offset."""
    wide = _filled((*x.shape[:-1], x.shape[-1] + 2 * AROUND), x)
    return wide[..., AROUND : AROUND + x.shape[-1]].copy_(x)


def offset(x: Tensor) -> Tensor:
    """Put ``x``, contiguous, behind a first element: nothing is aligned."""
    return _filled((x.numel() + 2,), x)[1:-1].view(x.shape).copy_(x)


def transposed(x: Tensor) -> Tensor:
    """Lay ``x`` out in the reverse order of its dims."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def expanded(x: Tensor) -> Tensor:
    """Repeat the first entry along the first dim, with stride 0."""
    return x[:1].expand(x.shape) if x.shape[0] else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transposed,
    "padded": padded,
    "every-other": every_other,
    "offset": offset,
    "expanded": expanded,
}
CONTIGUOUS, APART = ("offset",), ("transposed", "padded", "every-other", "offset")


def scaled(x: Tensor, exponent: int) -> Tensor:
    """Multiply by a power of two."""
    return (x.double() * 2.0**exponent).to(x.dtype)


def denormal(x: Tensor) -> Tensor:
    """Scale to numbers below the dtype's normal range."""
    return scaled(x, {torch.float16: -17, torch.float64: -1025}.get(x.dtype, -129))


def decades(x: Tensor, generator: torch.Generator) -> Tensor:
    """Give every element a magnitude of its own."""
    reach = 4 if x.dtype == torch.float16 else 12
    exponents = torch.randint(-reach, reach + 1, x.shape, generator=generator).double()
    return (x.double() * 2.0**exponents).to(x.dtype)


def sparse(x: Tensor, generator: torch.Generator) -> Tensor:
    """Keep one element in four; the others are zeros."""
    return x * (torch.rand(x.shape, generator=generator, dtype=torch.float64) < 0.25).to(x.dtype)


def with_one(x: Tensor, generator: torch.Generator, value: float) -> Tensor:
    """Put ``value`` into one element."""
    if x.numel():
        x = x.clone(memory_format=torch.contiguous_format)
        x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = value
    return x


VALUES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "large": lambda x, _: scaled(x, 4 if x.dtype == torch.float16 else 20),
    "tiny": lambda x, _: scaled(x, -8 if x.dtype == torch.float16 else -20),
    "denormal": lambda x, _: denormal(x),
    "zeros": lambda x, _: torch.zeros_like(x),
    "equal": lambda x, _: torch.full_like(x, 0.5),
    "ties": lambda x, _: (x.double() * 2).round().div(2).to(x.dtype),
    "sparse": sparse,
    "decades": decades,
    "huge": lambda x, _: scaled(x, 14 if x.dtype == torch.float16 else 100),
    "nan": lambda x, generator: with_one(x, generator, NAN),
    "inf": lambda x, generator: with_one(x, generator, INF),
    "minus-inf": lambda x, generator: with_one(x, generator, -INF),
}
FINITE = ("large", "tiny", "denormal", "zeros", "equal", "ties", "sparse", "decades")
NOT_FINITE = ("huge", "nan", "inf", "minus-inf")
