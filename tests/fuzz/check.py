"""Run one call and compare: results and gradients with the reference, and what a call must leave alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from hia_kernels import last_backend, testing, use_backend
from hia_kernels.core import backend
from hia_kernels.core.rounding import Bounded
from hia_kernels.testing import Expected, Results
from tests.fuzz import invalid
from tests.fuzz.case import NOT_FINITE, Case
from tests.fuzz.subjects import AUTO
from tests.inputs import Inputs
from tests.ops.conftest import poison_uninitialised

CHECKED, REFUSED = "checked", "refused"
ENOUGH, ENOUGH_ROWS = 128, 32  # elements, and rows of them; the root mean square of fewer errors is a matter of luck
ANY = 1e9  # a slack under which the root mean square says nothing
FEW_KEYS = 7
EQUAL = 4  # times the bound, where all terms are equal
REPEATED = 4  # one call in so many is repeated


class Fault(AssertionError):
    """A call does something wrong."""


def check(case: Case) -> str:
    """Run the call and compare.

    Returns:
        "checked", or "refused" where the backend that is forced says that it can't serve the call.

    Raises:
        Fault: anything is wrong.
    """
    try:
        with _around(case):
            if case.mutation is not None:
                return _check_invalid(case)
            return _check_valid(case)
    except Fault:
        raise
    except Exception as error:
        raise Fault(f"{type(error).__name__}: {error}") from error


@contextmanager
def _around(case: Case) -> Iterator[None]:
    """Set threads and backend, poison the library's new memory, and put everything back."""
    threads, replaced = torch.get_num_threads(), []

    def replace(owner: Any, name: str, allocate: Any) -> None:
        replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, allocate)

    torch.set_num_threads(case.threads)
    try:
        poison_uninitialised(replace)
        with use_backend(case.backend):
            yield
    finally:
        for owner, name, allocate in replaced:
            setattr(owner, name, allocate)
        torch.set_num_threads(threads)


def _check_invalid(case: Case) -> str:
    arguments = invalid.mutated(case)
    assert case.mutation is not None
    function: Callable[..., Any] = case.subject.call
    if case.raw:
        overload = getattr(torch.ops.hia, case.function)
        arguments = _by_schema(overload, arguments)
        function = overload
    error = None
    try:
        function(**arguments)
    except Exception as raised:
        error = raised
    also = ("out",) if case.function.endswith("_out") else ()  # as the function itself calls what it writes to
    problem = invalid.problem_of(error, (*case.arguments(), *also))
    if problem is not None:
        where = f"torch.ops.hia.{case.function}" if case.raw else case.function
        raise Fault(f"{where} with {case.mutation[0]} wrong ({case.mutation[1]}): {problem}")
    return CHECKED


def _by_schema(overload: Any, arguments: Inputs) -> Inputs:
    """Leave out what the registered op has no argument for, and fill in the default scale."""
    names = {argument.name for argument in overload.default._schema.arguments}
    found = {name: value for name, value in arguments.items() if name in names}
    if found.get("softmax_scale", 0.0) is None:
        found["softmax_scale"] = 0.25
    return found


def _check_valid(case: Case) -> str:
    arguments = case.arguments()
    kept, served = _Kept(arguments), []
    call = _watched(case, arguments, served)
    try:
        got = _run(case, call, arguments)
    except NotImplementedError as error:
        _check_refusal(case, error)
        return REFUSED
    except TypeError as error:  # an index of the other integer may be refused, and then by name
        if (
            case.index == "other"
            and str(error).startswith("hia::")
            and ("row_idx" in str(error) or "cu_" in str(error))
        ):
            return REFUSED
        raise
    _check_served(case, served)
    changed = kept.changed(case.subject.written)
    if changed:
        raise Fault(f"it changed {changed}")
    _compare(case, got)
    if case.seed % REPEATED == 0:
        again = _run(case, _watched(case, None, []), case.arguments())
        for name, x in got.items():
            if not torch.equal(_bits(x), _bits(again[name])):
                raise Fault(f"{name} differs between two runs")
    return CHECKED


def _run(case: Case, call: Callable[..., Any], arguments: Inputs) -> Results:
    with ExitStack() as stack:
        if case.autocast:
            stack.enter_context(torch.autocast("cpu", dtype=getattr(torch, case.autocast)))
        return testing.forward_backward(call, arguments, case.gradients)


def _watched(case: Case, arguments: Inputs | None, served: list[str | None]) -> Callable[..., Any]:
    """Note who serves the forward, look at what it returns, and let gradients arrive as the case says."""

    def call(**given: Any) -> Any:
        outs = case.subject.call(**given)
        served.append(last_backend(case.subject.op))
        if arguments is not None:
            _check_outputs(case, outs if isinstance(outs, tuple) else (outs,), arguments)
        return _with_dout(outs, case.dout)

    return call


def _with_dout(outs: Any, how: str) -> Any:
    first, *rest = outs if isinstance(outs, tuple) else (outs,)
    if how == "transposed":
        first = first.permute(tuple(reversed(range(first.ndim))))
    elif how == "summed" and first.requires_grad:
        first = first.expand(2, *first.shape).sum(0)
    return (first, *rest) if rest else first


def _check_outputs(case: Case, outs: tuple[Tensor, ...], arguments: Inputs) -> None:
    for position, out in enumerate(outs):
        if case.subject.written and position == 0:
            continue
        if not out.is_contiguous():
            raise Fault(f"output {position} must be contiguous, got shape {list(out.shape)}, strides {out.stride()}")
        if out._base is not None:
            raise Fault(f"output {position} is a view")
        mine = out.untyped_storage().data_ptr()
        shared = [
            name for name, x in arguments.items() if isinstance(x, Tensor) and x.untyped_storage().data_ptr() == mine
        ]
        if shared and out.numel():
            raise Fault(f"output {position} shares memory with {shared}")


class _Kept:
    """The memory of a call's tensors, that of their padding too, as it was before."""

    def __init__(self, arguments: Inputs) -> None:
        self._tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
        self._before = {name: _memory(x).clone() for name, x in self._tensors.items()}

    def changed(self, written: str) -> list[str]:
        """List the arguments whose memory is not what it was; of the written one, what is outside it."""
        return [name for name, x in self._tensors.items() if self._differs(name, x, name == written)]

    def _differs(self, name: str, x: Tensor, is_written: bool) -> bool:
        now, before = _memory(x), self._before[name]
        if is_written:
            outside = torch.ones(now.numel() // x.element_size(), dtype=torch.bool)
            outside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
            now, before = (one.view(-1, x.element_size())[outside] for one in (now, before))
        return not torch.equal(now, before)


def _memory(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def _bits(x: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.where(x.isnan(), 0, x).contiguous().view(integers[x.element_size()])


def _check_refusal(case: Case, error: NotImplementedError) -> None:
    message = str(error)
    if case.backend == AUTO or not message.startswith("hia::") or case.backend not in message:
        raise Fault(f"the call was refused: {message[:300]}") from error


def _check_served(case: Case, served: list[str | None]) -> None:
    row = backend.TABLES[case.subject.op].row(case.backend)
    if row is not None and served != [case.backend]:
        raise Fault(f"{case.backend} is forced, {served} served")


def _compare(case: Case, got: Results) -> None:
    inputs = case.arguments()  # made again: what an op has written is as it was
    if case.autocast:
        dtype = getattr(torch, case.autocast)
        castable = [name for name in case.subject.cast if inputs[name] is not None]
        inputs |= {name: inputs[name].to(dtype) for name in castable}
    reference = case.subject.reference
    for name, x in inputs.items():
        if isinstance(x, Tensor):  # the analysis of roundings knows no strides
            index = {"row_idx": torch.int64, "cu_seqlens_q": torch.int32, "cu_seqlens_k": torch.int32}.get(name)
            inputs[name] = x.to(index or x.dtype).contiguous()
    expected = testing.expect(
        lambda **given: _with_dout(reference(**given), case.dout), inputs, case.gradients, dtype=_tested_dtype(case)
    )
    if set(expected.plain) != set(got):
        raise Fault(f"results must be {sorted(expected.plain)}, got {sorted(got)}")
    spoilt = _is_spoilt(case, inputs)
    for name, out in got.items():
        if case.autocast and name.startswith("d") and name[1:] in case.gradients:
            out = out.to(expected.plain[name].dtype)  # the gradient of the cast argument, in the caller's dtype
        problem = _problem(case, name, out, expected, spoilt)
        if problem is not None:
            raise Fault(problem)


def _tested_dtype(case: Case) -> torch.dtype:
    """Return the coarsest of the dtypes that go in and out; gradients come back in the caller's."""
    names = (case.dtype, case.autocast or case.dtype, case.options.get("out_dtype") or case.dtype)
    return max((getattr(torch, name) for name in names), key=_roundoff)


def _roundoff(dtype: torch.dtype) -> float:
    return testing.UNIT_ROUNDOFF[dtype]


def _is_spoilt(case: Case, inputs: Inputs) -> bool:
    """Tell whether an input is not finite, as it was drawn or cast."""
    floating = (x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point())
    return not set(NOT_FINITE).isdisjoint(case.values.values()) or not all(x.isfinite().all() for x in floating)


def _problem(case: Case, name: str, out: Tensor, expected: Expected, spoilt: bool) -> str | None:
    """Compare one result, by the tolerance policy where everything is finite."""
    bounded, plain = expected.exact[name], expected.plain[name]
    exact = _value(bounded)
    if out.shape != exact.shape or out.dtype != plain.dtype:
        return f"{name}: {out.dtype} {list(out.shape)} must be {plain.dtype} {list(exact.shape)}"
    lost_by_dtype = exact.isfinite() & ~plain.isfinite()  # too large for the dtype, or on the way there
    # what a ReLU passes back of NaN is nobody's contract, and gradients of huge scores have lost them beside their lse
    if bool(exact.isfinite().all()) and not bool(lost_by_dtype.any()) and not (spoilt and name.startswith("d")):
        return _within(case, name, out, expected)
    return _pattern_problem(case, name, out, exact, plain)


def _value(x: Tensor) -> Tensor:
    return x.value if isinstance(x, Bounded) else x


def _within(case: Case, name: str, out: Tensor, expected: Expected) -> str | None:
    """Apply the policy; element by element alone where a root mean square says little.

    That is where there are few elements, or where terms are so alike, or so far apart, that a result is what is left
    of a difference that should be zero.
    """
    alike = "expanded" in case.layouts.values() or (name.startswith("d") and _has_few_keys(case))
    rows = out.numel() // max(1, out.shape[-1] if out.ndim else 1)  # a row shares the errors of its softmax or norm
    if case.subject.op == "cross_attention":
        rows = sum(case.shape["lengths_q"]) * case.shape["heads"]  # a gradient's too are those of the queries' sums
    exact = expected.exact[name]
    if isinstance(exact, Bounded):
        error = (out - exact.value).abs()
        forgiven = (error > exact.bound()) & (error <= _tolerated(case, name, exact))
        out = torch.where(forgiven, exact.value.to(out.dtype), out)
    if not case.values and not alike and out.numel() >= ENOUGH and (out.ndim == 1 or rows >= ENOUGH_ROWS):
        return expected.problem(name, out)
    found = testing.mismatch(name, out, expected.exact[name], expected.plain[name], dtype=expected.dtype, slack=ANY)
    return None if found is not None and "huge" in case.values.values() and "bounds" in found else found


def _tolerated(case: Case, name: str, exact: Bounded) -> Tensor:
    """Return the errors that the bounds have no room for, with good reason; 0 in nearly all calls."""
    if case.subject.op == "row_softmax" and name == "dscores" and case.options.get("out_dtype") == "float16":
        return torch.full_like(exact.value, 16 * 2.0**-25)  # p is kept in fp16: below its range, times dp - delta
    if _is_winograd(case):  # its transforms mix the taps of a filter and the pixels of a tile
        return exact.bound().amax().expand_as(exact.value) if exact.numel() else exact.value
    values = list(case.values.values())
    if case.subject.op == "conv_norm_act" and case.dtype == "float16" and "denormal" in values:
        # the scale is multiplied into the weight, in its dtype: each tap rounds by 2**-25, and meets dout
        return torch.full_like(exact.value, 8 * 2.0**-25 * math.sqrt(case.shape["channels"][1]))
    if values.count("equal") > 1:  # a sum of equal terms rounds the same way in every step
        return EQUAL * exact.bound()
    return torch.zeros_like(exact.value)


def _pattern_problem(case: Case, name: str, out: Tensor, exact: Tensor, plain: Tensor) -> str | None:
    """Demand that nothing is finite that must not be, nor the other way round."""
    bad = ~exact.isfinite() & ~plain.isfinite()
    lost = bad & out.isfinite()
    if bool(lost.any()) and not _has_onednns_relu(case) and not (name.startswith("d") and _has_infinite_scores(case)):
        return f"{name}: {int(lost.sum())} of {out.numel()} are finite and should not be"
    overflows = bool((exact.isfinite() & ~plain.isfinite()).any())
    gained = exact.isfinite() & plain.isfinite() & ~out.isfinite()
    overflows |= name.startswith("d") and case.subject.op.endswith("attention")  # in exp(scores - lse), taken again
    overflows |= _has_spoilt_taps(case) or _is_tiled_by_onednn(case)
    if not overflows and not _is_winograd(case) and bool(gained.any()):
        return f"{name}: {int(gained.sum())} of {out.numel()} are not finite and should be"
    return None


def _has_few_keys(case: Case) -> bool:
    """Tell whether some softmax is over so few keys that its gradient is a difference near zero."""
    lengths = case.shape.get("lengths_k", case.shape.get("lengths", ()))
    return any(0 < length < FEW_KEYS for length in lengths)


def _has_infinite_scores(case: Case) -> bool:
    """Tell whether an infinite score may leave the other keys, whose gradients softmax makes NaN, a weight of 0."""
    return case.subject.op.endswith("attention") and not {"inf", "minus-inf"}.isdisjoint(case.values.values())


def _has_onednns_relu(case: Case) -> bool:
    """Tell whether oneDNN's ReLU may serve, which is 0 for NaN: another pass costs more than the fusion gains."""
    relu = case.subject.op == "conv_norm_act" and case.shape["activation"] == "relu"
    return relu and case.backend in (AUTO, "cpu")


def _has_spoilt_taps(case: Case) -> bool:
    """Tell whether a weight meets the zeros around an image, or, of a stem, sums of infinities that cancel."""
    names = ("weight", "scale") if case.subject.op == "stem" else ("weight",) * (case.shape.get("kernel", 1) > 1)
    return not {case.values.get(name) for name in names}.isdisjoint(NOT_FINITE)


def _is_tiled_by_onednn(case: Case) -> bool:
    """Tell whether oneDNN may spread what is not finite to neighbours (docs/conv_norm_act.md, "NaN")."""
    return case.function.startswith("conv_norm_act_packed") and case.dtype == "bfloat16"


def _is_winograd(case: Case) -> bool:
    """Tell whether a row may compute tiles of outputs together, in which what is not finite spreads."""
    return (case.shape.get("kernel"), case.shape.get("stride")) == (3, 1)


__all__ = ["CHECKED", "REFUSED", "Fault", "check"]
