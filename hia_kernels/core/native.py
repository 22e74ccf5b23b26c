"""The optional native extension: schemas of its functions, and whether it was built.

:data:`BUILD` compiles csrc/ to ``hia_kernels/_native*.so``, which registers implementations
of these private functions; the ops' tables ask :func:`unavailable_reasons` and call ``torch.ops.hia_native``.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from . import once, settings

once.refuse_reload(globals())

REVISION = 5  # csrc/registration.cpp returns the same number; raised with every change of a schema or a layout
_ROOT = Path(__file__).resolve().parents[2]
BUILD = (
    "python setup.py build_ext --inplace"
    if (_ROOT / "csrc").is_dir() and (_ROOT / "setup.py").is_file()
    else "HIA_BUILD_NATIVE=1 pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir"
    " --no-binary hia-kernels hia-kernels"
)  # in a checkout, and for what pip has installed

_SCHEMAS = (
    "revision() -> int",
    "cpu_isa() -> str",
    "conv_direct_weight(Tensor weight, Tensor? scale, bool turned, Tensor(a!) out) -> ()",
    "conv_winograd_weight(Tensor weight, Tensor? scale, bool turned, Tensor(a!) out) -> ()",
    "conv_direct(Tensor x, Tensor weight, Tensor? shift, Tensor? residual, int stride, bool pad_rows, bool relu,"
    " Tensor(a!) out) -> ()",
    "conv_winograd(Tensor x, Tensor weight, Tensor? shift, Tensor? residual, bool pad_rows, bool relu, Tensor(a!) out)"
    " -> ()",
    "conv_winograd_weight_gradient(Tensor dz, Tensor x, Tensor(a!) out) -> ()",
    "stem(Tensor pixels, Tensor window, Tensor weight, Tensor inside, Tensor shift, float centre, int kernel,"
    " bool pool, Tensor(a!) out) -> ()",
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out, bool add) -> ()",
)
for _schema in _SCHEMAS:
    once.define("hia_native::" + _schema.partition("(")[0], _schema[_schema.index("(") :])


def library() -> Path | None:
    """Return the extension's file; None before it was built."""
    found = Path(__file__).resolve().parents[1].glob("_native*.so")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)  # the one that was built last


@cache
def unavailable_reasons() -> tuple[str, ...]:
    """Return why the extension can't serve; empty if it can. Loads it on first use, unless a copy is loaded already:
    the kernels of a second one would take the first one's place."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("hia_native::revision", "CompositeExplicitAutograd"):
        revision = torch.ops.hia_native.revision()
        again = f"this process has loaded an extension of revision {revision}, not {REVISION}: load none by hand"
        return () if revision == REVISION else (again,)
    path = library()
    if path is None:
        return (f"the native extension is not built: {BUILD}",)
    try:
        torch.ops.load_library(str(path))
        revision = torch.ops.hia_native.revision()
    except (OSError, RuntimeError, NotImplementedError) as error:
        return (f"{path.name} does not load, build it again ({BUILD}): {str(error).strip().partition(chr(10))[0]}",)
    if revision != REVISION:
        return (f"{path.name} is of revision {revision}, not {REVISION}: build it again ({BUILD})",)
    return ()


def _best_cpu_isa(asked: str) -> str:
    """Return the instructions that the extension takes, "" for none; it reads the variable at its first use."""
    given = os.environ.get("HIA_CPU_ISA")
    if given is None or given == asked:
        return torch.ops.hia_native.cpu_isa()
    os.environ["HIA_CPU_ISA"] = asked  # as it spells it
    try:
        return torch.ops.hia_native.cpu_isa()
    finally:
        os.environ["HIA_CPU_ISA"] = given


@cache
def _cpu_reasons(asked: str) -> tuple[str, ...]:
    if asked == "none":
        return ("HIA_CPU_ISA=none turns the native kernels off",)
    reasons = unavailable_reasons()
    if reasons or _best_cpu_isa(asked):
        return reasons
    if asked:
        raise RuntimeError(f"HIA_CPU_ISA={asked} asks for instructions that this processor does not have")
    return ("the native kernels need AVX2 and FMA, or AVX-512",)


def cpu_unavailable_reasons() -> list[str]:
    """Return why its CPU kernels can't serve here.

    Raises:
        ValueError: ``HIA_CPU_ISA`` is none of its choices.
        RuntimeError: it asks for instructions that this processor does not have.
    """
    return list(_cpu_reasons(settings.read("HIA_CPU_ISA")))
