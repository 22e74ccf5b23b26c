"""Compile tier: every Triton kernel for every target, without a GPU."""

from __future__ import annotations

import pytest

from bench import compiled
from hia_kernels.core import triton_support

triton = pytest.importorskip("triton", reason="NO TRITON: the compile tier is not tested")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(triton_support.interpreted(), reason="the interpreter tier runs in this process")

CASES = [pytest.param(spec, target, id=f"{spec.name}-{target}") for spec in compiled.specs() for target in spec.targets]


@triton.jit
def _product_kernel(a_ptr, b_ptr, c_ptr, PRECISION: tl.constexpr):
    """One product of fp32 operands, 64 x 64 x 64."""
    offs = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]  # [64, 64]
    c = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), input_precision=PRECISION)
    tl.store(c_ptr + offs, c)


def product_spec(precision, **options):
    pointers = dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), "*fp32")
    return compiled.Spec("product", __name__, "_product_kernel", pointers, {"PRECISION": precision}, **options)


@pytest.mark.parametrize(("spec", "target"), CASES)
def test_compiles_within_limits(spec, target):
    found = compiled.compile_spec(spec, target)
    wrong = compiled.problems(spec, target, found)
    if target in spec.waived:
        assert wrong, f"{spec.name} is waived on {target} ({spec.waived[target]}) and needs no waiver"
    else:
        assert not wrong, f"{spec.name} on {target}: {', '.join(wrong)}; {found}"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_a_product_in_tf32_is_noticed(target):
    found = {name: compiled.compile_spec(product_spec(name), target) for name in ("ieee", "tf32")}
    assert not found["ieee"].reduced and found["tf32"].reduced
    assert compiled.problems(product_spec("tf32"), target, found["tf32"]) == ["multiplies in tf32"]


def test_register_limits():
    limits = {(target, warps): compiled.register_limit(target, warps) for target in ("sm_90", "gfx942")
              for warps in (4, 8, 16)}  # fmt: skip
    assert limits == {("sm_90", 4): 255, ("sm_90", 8): 255, ("sm_90", 16): 128,
                      ("gfx942", 4): 512, ("gfx942", 8): 256, ("gfx942", 16): 128}  # fmt: skip
    found = compiled.Resources(registers=129, spilled=0, shared=0, matrix=False)
    assert compiled.problems(product_spec("ieee", num_warps=16), "sm_90", found) == [
        "takes 129 registers a thread, has 128"
    ]


def test_every_spec_has_its_own_name():
    names = [spec.name for spec in compiled.specs()]
    assert len(names) == len(set(names))


def test_the_table_in_the_docs_lists_these_kernels():
    """Its numbers are of whoever ran the generator last; its rows, launches and targets are these."""
    lines = compiled.DOCUMENT.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    header, *found = rows
    assert header == ["kernel", "warps", "stages", *compiled.TARGETS]
    listed = [(*row[:3], tuple(target for target, cell in zip(header[3:], row[3:], strict=True) if cell))
              for row in found]  # fmt: skip
    expected = [(spec.name, str(spec.num_warps), str(spec.num_stages), tuple(t for t in compiled.TARGETS if t in
                 spec.targets)) for spec in compiled.specs()]  # fmt: skip
    assert listed == expected, f"{compiled.DOCUMENT.name} is out of date: python -m bench.compiled --write"
    notes = {line.removeprefix("- ").split(":")[0] for line in lines if line.startswith("- ")}
    assert notes == {f"{spec.name}, {target}" for spec in compiled.specs() for target in spec.waived}
