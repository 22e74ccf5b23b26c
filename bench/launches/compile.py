"""Compiles recorded launches without a GPU, in parallel, and says what each takes of one; results are kept on disk."""

from __future__ import annotations

import hashlib
import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..records.environment import REPOSITORY
from ..records.files import read_json, write_json
from .device import TARGETS, Target
from .record import Launch

Item = tuple[Launch, str]  # a launch and the name of its target
FOLDER = REPOSITORY / "build" / "launches"
REVISION = 1  # of what is read out of a compiled kernel; raised with every change of Resources or of how they are read
MATRIX_INSTRUCTIONS = ("mma.sync", "wgmma", "tcgen05.mma", "mfma")
REDUCED = {"cuda": "tf32", "hip": "xf32"}  # products of fp32 operands that are cut to 10 bits first
_DOT = re.compile(r"tt\.dot .*: tensor<[\dx]+x(\w+)> \* tensor<[\dx]+x(\w+)>")
_BUFFERS = re.compile(r"ttg\.local_alloc\s*:\s*\(\)\s*->\s*!ttg\.memdesc<(\d+)x\d+x\d+x")


@dataclass(frozen=True)
class Resources:
    """Resources that a compiled kernel takes of a GPU.

    Attributes:
        registers: of a thread.
        spilled: bytes a thread keeps in memory for want of registers.
        shared: bytes of shared memory a block.
        matrix: the matrix instructions that occur, of :data:`MATRIX_INSTRUCTIONS`.
        dots: (products of 16-bit operands, other products) in the source's loops and branches.
        reduced: whether fp32 operands are multiplied with the precision of TF32.
        depth: buffers of the deepest pipelined load; 0 where no load is pipelined.
        error: why it does not compile; the rest is 0 then.
    """

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    matrix: tuple[str, ...] = ()
    dots: tuple[int, int] = (0, 0)
    reduced: bool = False
    depth: int = 0
    error: str = ""


def _source(launch: Launch) -> Any:
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    names = [name for name, _ in launch.signature]
    return ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={(names.index(name),): value for name, value in launch.constexprs},
        attrs={(names.index(name),): [list(fact) for fact in facts] for name, facts in launch.attributes},
    )


def key_of(launch: Launch, target: Target) -> str:
    """Hash everything that a compiled kernel follows from: Triton's own key, of its version, the kernel's source and
    all that it calls, signature, specialisation, constexprs, options, target and the compiler's variables."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    backend = make_backend(target.gpu_target())
    options = backend.parse_options(dict(launch.options))
    key = get_cache_key(_source(launch), backend, options, env_vars=get_cache_invalidating_env_vars())
    return hashlib.sha256(f"{REVISION}-{key}".encode()).hexdigest()


def compile_launch(launch: Launch, target: Target) -> Resources:
    """Compile for a target; needs Triton, no GPU, and no ``TRITON_INTERPRET``. Triton keeps the binary in its cache,
    under the key that a launch on such a GPU looks for."""
    import triton

    compiled = triton.compile(_source(launch), target=target.gpu_target(), options=dict(launch.options))
    asm = compiled.asm
    text = asm["ptx" if target.kind == "cuda" else "amdgcn"]
    registers, spilled = _nvidia(asm["cubin"]) if target.kind == "cuda" else _amd(text)
    halves = [set(pair) <= {"bf16", "f16"} for pair in _DOT.findall(asm["ttir"])]
    return Resources(
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        matrix=tuple(name for name in MATRIX_INSTRUCTIONS if name in text),
        dots=(sum(halves), len(halves) - sum(halves)),
        reduced=REDUCED[target.kind] in text,
        depth=max((int(count) for count in _BUFFERS.findall(asm["ttgir"])), default=0),
    )


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """Read registers and bytes spilled, of a thread."""
    import triton.backends.nvidia as backend

    tool = Path(backend.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        printed = subprocess.run(
            [str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True, timeout=60
        )
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", printed.stdout + printed.stderr))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def _amd(text: str) -> tuple[int, int]:
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", text))
    return int(found["vgpr_count"]), 4 * int(found["vgpr_spill_count"])


def stored(key: str, folder: Path) -> Resources | None:
    """Read what was found before; None where nothing was, or where the entry is damaged."""
    try:
        content = read_json(folder / f"{key}.json")
        found = Resources(**{**content, "matrix": tuple(content["matrix"]), "dots": tuple(content["dots"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    # every field as it was written, none left to its default
    whole = len(content) == len(fields(Resources))
    return found if whole and all(type(getattr(found, f.name)) is type(f.default) for f in fields(found)) else None


def store(key: str, found: Resources, folder: Path) -> None:
    """Keep a result; a reader sees all of it or nothing."""
    write_json(folder / f"{key}.json", asdict(found))


def _work(launch: Launch, target: str) -> Resources:
    try:
        return compile_launch(launch, TARGETS[target])
    except Exception as error:  # ptxas and LLVM report in many ways; whatever it is, it is this launch's result
        return Resources(error=f"{type(error).__name__}: {error}"[:2000])


def compile_all(
    items: Iterable[Item],
    *,
    jobs: int | None = None,
    folder: Path = FOLDER,
    fresh: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Item, Resources]:
    """Compile launches that no result is kept for.

    Args:
        items: launches and the names of their targets.
        jobs: processes; None means as many as there are cores.
        folder: of the results.
        fresh: compile everything, whatever is kept. Triton's own cache still counts.
        progress: called with the number of kernels compiled and to be compiled, as one ends.

    Returns:
        Resources of every item; those that don't compile say so in ``error``, and are not kept.
    """
    items = list(dict.fromkeys(items))
    keys = {item: key_of(item[0], TARGETS[item[1]]) for item in items}
    found = {} if fresh else {item: kept for item in items if (kept := stored(keys[item], folder)) is not None}
    missing = [item for item in items if item not in found]
    for done, (item, result) in enumerate(_compiled(missing, jobs or len(os.sched_getaffinity(0))), 1):
        found[item] = result
        if not result.error:
            store(keys[item], result, folder)
        progress(done, len(missing))
    return {item: found[item] for item in items}


def _compiled(items: Sequence[Item], jobs: int) -> Iterable[tuple[Item, Resources]]:
    if min(jobs, len(items)) <= 1:
        yield from ((item, _work(*item)) for item in items)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(min(jobs, len(items)), mp_context=context) as pool:
        futures = {pool.submit(_work, *item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()
