"""Every Triton kernel compiled without a GPU, and what it needs of one: ``python -m bench.compiled``.

For sm_80, sm_90, sm_100 and gfx942: registers, bytes spilled, shared memory, matrix instructions. Each op lists its
kernels in ``bench/compiled_specs/<op>.py``; ``tests/ops/test_compiled.py`` asserts the limits.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64),
}  # fmt: skip
# a block's shared memory, bytes: CUDA C++ programming guide, table "technical specifications"; CDNA 3 ISA, LDS
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# likewise: registers of a thread and of a block; CDNA 3: of a lane, which the waves of a SIMD share
REGISTERS, REGISTERS_OF_A_BLOCK, REGISTERS_OF_A_LANE = 255, 64 * 1024, 512
REDUCED = {"cuda": "tf32", "hip": "xf32"}  # products of fp32 operands that are cut to 10 bits first: never ours
MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "compiled.md"


@dataclass(frozen=True)
class Spec:
    """One kernel with one configuration.

    Attributes:
        name: as the table shows it, e.g. "cross_attention fwd d128 bf16".
        module: dotted path of the kernel's file.
        kernel: its name there.
        signature: type of every argument that is not a constexpr, in Triton's words: "*bf16", "*i32", "i32", "fp32".
        constexprs: value of every constexpr argument.
        num_warps: of the launch.
        num_stages: of the launch.
        uses_dot: whether matrix instructions must be there.
        targets: of :data:`TARGETS`.
        unaligned: arguments not known to be multiples of 16; the others are, as torch's allocations and sizes.
        waived: {target: reason}: what is not asserted there, and why. The table shows it.
    """

    name: str
    module: str
    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    uses_dot: bool = False
    targets: tuple[str, ...] = tuple(TARGETS)
    unaligned: tuple[str, ...] = ()
    waived: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: a thread.
        spilled: bytes a thread keeps in memory for want of registers.
        shared: bytes of shared memory a block.
        matrix: whether the target's matrix instruction occurs.
        reduced: whether fp32 operands are multiplied with the precision of TF32.
    """

    registers: int
    spilled: int
    shared: int
    matrix: bool
    reduced: bool = False


def specs() -> list[Spec]:
    """Those of every op."""
    from . import compiled_specs

    found: list[Spec] = []
    for module in sorted(entry.name for entry in pkgutil.iter_modules(compiled_specs.__path__)):
        found += importlib.import_module(f"{compiled_specs.__name__}.{module}").SPECS
    return found


def compile_spec(spec: Spec, target: str) -> Resources:
    """Compile for a target of :data:`TARGETS`; needs Triton, no GPU, and no ``TRITON_INTERPRET``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(spec.module), spec.kernel)
    signature = {name: spec.signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [name for name, kind in signature.items() if kind[0] in "*i" and name not in spec.unaligned]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(spec.constexprs), attrs=attributes)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    if target.startswith("gfx"):
        return _amd(compiled, target)
    return _nvidia(compiled, target)


def _nvidia(compiled: Any, target: str) -> Resources:
    import triton.backends.nvidia as backend

    tool = Path(backend.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        printed = subprocess.run(
            [str(tool), "-res-usage", str(cubin)], capture_output=True, text=True, check=True, timeout=60
        )
    text = printed.stdout + printed.stderr
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK", "LOCAL"))
    ptx = compiled.asm["ptx"]
    matrix, reduced = (word in ptx for word in (MATRIX_INSTRUCTION[target], REDUCED["cuda"]))
    return Resources(registers, stack + local, compiled.metadata.shared, matrix, reduced)


def _amd(compiled: Any, target: str) -> Resources:
    text = compiled.asm["amdgcn"]
    registers, spilled = (int(re.search(rf"\.{word}:\s*(\d+)", text)[1]) for word in ("vgpr_count", "vgpr_spill_count"))
    matrix, reduced = (word in text for word in (MATRIX_INSTRUCTION[target], REDUCED["hip"]))
    return Resources(registers, 4 * spilled, compiled.metadata.shared, matrix, reduced)


def register_limit(target: str, num_warps: int) -> int:
    """What a thread may have so that one block of the launch fits a multiprocessor."""
    kind, _, warp = TARGETS[target]
    if kind == "hip":
        return REGISTERS_OF_A_LANE // -(-num_warps // 4)
    return min(REGISTERS, REGISTERS_OF_A_BLOCK // (num_warps * warp))


def problems(spec: Spec, target: str, found: Resources) -> list[str]:
    """What breaks the target's limits."""
    wrong = []
    if found.spilled:
        wrong.append(f"spills {found.spilled} bytes")
    if found.shared > SHARED_LIMIT[target]:
        wrong.append(f"needs {found.shared} bytes of shared memory, has {SHARED_LIMIT[target]}")
    limit = register_limit(target, spec.num_warps)
    if found.registers > limit:
        wrong.append(f"takes {found.registers} registers a thread, has {limit}")
    if found.reduced:
        wrong.append(f"multiplies in {REDUCED[TARGETS[target][0]]}")
    if spec.uses_dot and not found.matrix:
        wrong.append(f"no {MATRIX_INSTRUCTION[target]}")
    return wrong


def table() -> str:
    """All specs on all their targets, in Markdown."""
    import triton

    lines = [
        "# What the Triton kernels take of a GPU", "",
        f"Compiled without one by `python -m bench.compiled`, Triton {triton.__version__}; "
        "`tests/ops/test_compiled.py` asserts the limits.",
        "Registers a thread / bytes spilled a thread / KiB of shared memory a block / matrix instruction.", "",
        "| kernel | warps | stages | " + " | ".join(TARGETS) + " |", "|---" * (3 + len(TARGETS)) + "|",
    ]  # fmt: skip
    notes = []
    for spec in specs():
        cells = [spec.name, str(spec.num_warps), str(spec.num_stages)]
        for target in TARGETS:
            if target not in spec.targets:
                cells.append("")
                continue
            found = compile_spec(spec, target)
            matrix = MATRIX_INSTRUCTION[target] if found.matrix else "-"
            cells.append(f"{found.registers} / {found.spilled} / {found.shared / 1024:.1f} / {matrix}")
        notes += [f"- {spec.name}, {target}: {reason}" for target, reason in spec.waived.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(["", "Not asserted:", "", *notes] if notes else [])]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or write it into docs/."""
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace {os.path.relpath(DOCUMENT)}")
    options = parser.parse_args(arguments)
    text = table()
    if options.write:
        part = DOCUMENT.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(DOCUMENT)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
