"""Strategies of calls: sizes that include 0, 1 and odd ones, memory layouts, values, dtypes, options; by function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from hia_kernels.ops.stem.functional import stem_reach
from tests.fuzz.case import APART, CONTIGUOUS, FINITE, INDICES, LAYOUTS, NOT_FINITE, Case
from tests.fuzz.invalid import mutations
from tests.fuzz.subjects import SUBJECTS, Subject, backends_of

Draw = Callable[[st.SearchStrategy[Any]], Any]
DTYPES = ("float32", "float16", "bfloat16", "float64")
HALVES = ("float16", "bfloat16")
SIZES = st.sampled_from((0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 33))
SOME = st.sampled_from((1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 33))
FEW = st.sampled_from((0, 1, 2, 3))
WIDE = st.sampled_from((0, 1, 3, 16, 48, 65, 100, 129))
PANELS = st.sampled_from((32, 64, 96))  # what the native convolutions take
MOSTLY = (True, True, True, True, True, False)  # the first is what shrinking leads to
KEPT_AS_THEY_ARE = ("window", "mean", "std")  # checked to be finite, and a deviation must not be 0


def small(draw: Draw, interpreted: bool, strategy: st.SearchStrategy[int]) -> int:
    """Draw a size; in the interpreter, which takes a second for a million elements, of at most 33."""
    return min(draw(strategy), 33) if interpreted else draw(strategy)


def _condition_queries(draw: Draw, backend: str, interpreted: bool) -> dict[str, Any]:
    tokens = draw(SIZES)
    return {
        "tokens": tokens,
        "samples": draw(FEW) if tokens else 0,
        "channels": small(draw, interpreted, WIDE),
        "queries": draw(SIZES),
        "dim": draw(SIZES),
        "bias": draw(st.booleans()),
    }


def _conv(draw: Draw, backend: str, interpreted: bool) -> dict[str, Any]:
    fits = backend == "native" and draw(st.sampled_from(MOSTLY))
    channels = st.tuples(PANELS, PANELS) if fits else st.tuples(SOME, SOME)
    sides = st.sampled_from((1, 2, 3, 5, 8, 9)) if interpreted else st.sampled_from((1, 2, 3, 5, 8, 13, 20))
    forms = ((3, 1),) * 5 + ((1, 1), (1, 2), (3, 2)) if fits else ((1, 1), (1, 2), (3, 1), (3, 2))
    kernel, stride = draw(st.sampled_from(forms))
    return {
        "size": (draw(sides), draw(sides)),
        "images": draw(st.sampled_from((1, 1, 2, 3, 0))),
        "channels": draw(channels),
        "kernel": kernel,
        "stride": stride,
        "activation": draw(st.sampled_from(("none", "relu", "gelu"))),
        "residual": draw(st.booleans()),
        "nchw": draw(st.booleans()),
    }


def _attention(draw: Draw, backend: str, interpreted: bool) -> dict[str, Any]:
    most = 20 if interpreted else 40
    lengths = draw(st.lists(st.tuples(st.integers(0, most), st.integers(0, most)), max_size=3))
    return {
        "lengths_q": tuple(q for q, _ in lengths),
        "lengths_k": tuple(k for _, k in lengths),
        "heads": draw(st.sampled_from((0, 1, 2, 3))),
        "head_dim": draw(st.sampled_from((16, 32, 48, 144) if interpreted else (16, 32, 48, 128, 144, 16, 32, 640))),
    }


def _head_linear(draw: Draw, backend: str, interpreted: bool) -> dict[str, Any]:
    return {
        "images": draw(FEW),
        "rows": draw(SIZES),
        "heads": draw(FEW),
        "channels": draw(WIDE),
        "dim": draw(SIZES),
        "merge_heads": draw(st.booleans()),
    }


def _inject(draw: Draw, backend: str, interpreted: bool) -> dict[str, Any]:
    tokens = draw(SIZES)
    return {
        "tokens": tokens,
        "rows": draw(st.integers(0, tokens)),
        "channels": small(draw, interpreted, WIDE),
        "dim": draw(SIZES),
        "bias": draw(st.booleans()),
    }


def _latent(draw: Draw, backend: str, interpreted: bool) -> dict[str, Any]:
    most = 20 if interpreted else 40
    return {
        "rows": draw(SIZES),
        "width": small(draw, interpreted, WIDE),
        "lengths": tuple(draw(st.lists(st.integers(0, most), max_size=3))),
    }


def _linear(draw: Draw, backend: str, interpreted: bool) -> dict[str, Any]:
    return {"rows": draw(SIZES), "channels": draw(WIDE), "dim": draw(SIZES | WIDE), "bias": draw(st.booleans())}


def _norm_linear(draw: Draw, backend: str, interpreted: bool) -> dict[str, Any]:
    tokens = draw(SIZES)
    return {
        "tokens": tokens,
        "rows": draw(st.none() | SIZES) if tokens else draw(st.sampled_from((None, 0))),
        "channels": small(draw, interpreted, WIDE),
        "dim": draw(SIZES),
        "bias": draw(st.booleans()),
        "norm_dtype": draw(st.sampled_from((None, "float32"))),
        "offset": draw(st.sampled_from((0.0, 0.5, 8.0))),
    }


def _softmax(draw: Draw, backend: str, interpreted: bool) -> dict[str, Any]:
    return {
        "rows": draw(SIZES),
        "columns": draw(SIZES | st.sampled_from((130, 700, 2100))),
        "scale": draw(st.sampled_from((0.25, 1.0, -0.3, 0.0))),
        "spread": draw(st.sampled_from((0.1, 4.0, 400.0))),
    }


def _stem(draw: Draw, backend: str, interpreted: bool) -> dict[str, Any]:
    kernel, pool = draw(st.sampled_from((3, 7))), draw(st.sampled_from((1, 3)))
    reach, more = stem_reach(kernel, pool), st.integers(0, 5 if interpreted else 30)
    fits = backend == "native" and draw(st.sampled_from(MOSTLY))
    pixels = ("uint8", "uint16", "float32") + (() if fits else ("float16", "bfloat16", "float64"))
    return {
        "size": (reach + draw(more), reach + draw(more)),
        "images": draw(st.sampled_from((0, 1, 1, 2))),
        "pixel_dtype": draw(st.sampled_from(pixels)),
        "channels": draw(st.sampled_from((1, 3))),
        "kernel": kernel,
        "out_channels": draw(PANELS if fits else st.sampled_from((8, 1, 3, 13, 16))),
        "pool": pool,
    }


SHAPES: dict[str, Callable[[Draw, str, bool], dict[str, Any]]] = {
    "condition_queries": _condition_queries,
    "conv_norm_act": _conv,
    "cross_attention": _attention,
    "head_linear": _head_linear,
    "inject_rows": _inject,
    "latent_attention": _latent,
    "linear": _linear,
    "norm_linear": _norm_linear,
    "row_softmax": _softmax,
    "stem": _stem,
}


def _options(draw: Draw, function: str, dtype: str) -> dict[str, Any]:
    """Draw arguments that are no part of a shape."""
    if "packed" in function and function.startswith("conv"):
        return {"pad_rows": draw(st.booleans())}
    if function.startswith("cross_attention"):
        return {"softmax_scale": draw(st.sampled_from((None, 0.125, -0.2, 0.0)))}
    if function == "row_softmax":
        halves = tuple(name for name in HALVES if dtype not in HALVES or dtype == name)  # their ranges differ
        wide = (None, "float32", *halves) + (("float64",) if dtype == "float64" else ())
        return {"out_dtype": draw(st.sampled_from(wide))}
    return {}


def _layouts(draw: Draw, subject: Subject, tensors: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in tensors:
        if not draw(st.booleans()):
            continue
        if name == subject.written:
            found[name] = draw(st.sampled_from(APART if subject.op == "row_softmax" else CONTIGUOUS))
        elif name not in INDICES:
            found[name] = draw(st.sampled_from(tuple(LAYOUTS)))
    return found


def _values(draw: Draw, names: tuple[str, ...], any_value: bool, most: int) -> dict[str, str]:
    """Draw unusual values for none, one or two arguments; what is not finite, or overflows, for one alone.

    A sum of nothing may be 0 or, scaled by NaN, NaN: with an axis of size 0 values are finite. Attention has at most
    one unusual argument: its gradients take exp(scores - lse) again, which at scores of 1e8 roundings make any size.
    """
    kind = draw(st.sampled_from(("usual", "usual", "one", "one", "two", *(["not-finite"] if any_value else []))))
    if kind == "usual" or not names:
        return {}
    if kind == "not-finite":
        return {draw(st.sampled_from(names)): draw(st.sampled_from(NOT_FINITE))}
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=1 if kind == "one" else most, unique=True))
    return {name: draw(st.sampled_from(FINITE)) for name in chosen}


def _dtype(draw: Draw, function: str, backend: str) -> str:
    """Draw a dtype; mostly one that the backend takes, since what is refused tests little."""
    if function == "stem_packed":
        return draw(st.sampled_from(DTYPES[:3]))
    if "packed" in function:
        return draw(st.sampled_from(("float32", "float32", "float32", "bfloat16")))
    if backend in ("native", "cpu") and draw(st.sampled_from(MOSTLY)):
        return "float32"
    if backend in ("triton", "cublas"):
        return draw(st.sampled_from((*DTYPES[:3], *DTYPES[:3], "float64")))
    return draw(st.sampled_from(DTYPES))


def valid(draw: Draw, function: str, backend: str) -> Case:
    """Draw a call that must give the reference's result."""
    subject, interpreted = SUBJECTS[function], backend in ("triton", "cublas")
    dtype = _dtype(draw, function, backend)
    shape = SHAPES[subject.op](draw, backend, interpreted)
    if subject.written == "residual":
        shape["residual"] = True
    options = _options(draw, function, dtype)
    if options.get("pad_rows") is False:
        shape["size"] = (max(shape["size"][0], shape["kernel"]), shape["size"][1])
    tensors = tuple(subject.shapes)
    floating = tuple(name for name in tensors if name not in (*INDICES, *KEPT_AS_THEY_ARE))
    if not str(shape.get("pixel_dtype", "float")).startswith("float"):
        floating = tuple(name for name in floating if name != "pixels")
    wrt = subject.differentiable
    gradients = tuple(name for name in wrt if draw(st.sampled_from(MOSTLY)))
    castable = dtype == "float32" and subject.cast and not subject.packed and not subject.written
    castable = castable and backend not in ("native", "cpu")  # which leave halves to others
    autocast = draw(st.sampled_from(("", "", "", *HALVES))) if castable else ""
    return Case(
        function,
        backend,
        dtype,
        shape,
        options,
        seed=draw(st.integers(0, 2**16)),
        values=_values(draw, floating, 0 not in shape.values(), 1 if subject.op.endswith("attention") else 2),
        layouts=_layouts(draw, subject, tensors),
        index=draw(st.sampled_from(("usual", "usual", "strided", "strided", "other"))),
        gradients=gradients,
        dout=draw(st.sampled_from(("drawn", "drawn", "transposed", "summed"))),
        autocast=autocast,
        threads=draw(st.sampled_from((1, 2))),
    )


def invalid(draw: Draw, function: str, backend: str) -> Case:
    """Draw a valid call in which one argument is wrong."""
    case = valid(draw, function, backend)
    plain = Case(function, backend, case.dtype, case.shape, case.options, seed=case.seed, layouts=case.layouts)
    found = mutations(plain)
    raw = draw(st.booleans()) and not SUBJECTS[function].packed
    chosen = draw(st.sampled_from(found))
    return Case(**{**vars(plain), "mutation": chosen, "raw": raw and not chosen[1].startswith("python-")})


CALLS = [(function, backend) for function in SUBJECTS for backend in backends_of(function)]
