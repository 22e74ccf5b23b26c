"""Compile tier: every launch of ops and composites, for every target, compiled without a GPU and within its limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.launches import limits
from bench.launches.compile import Resources, compile_launch
from bench.launches.device import TARGETS
from bench.launches.record import launch_of
from bench.launches.workloads import record
from bench.workloads import composites, ops
from hia_kernels.core import triton_support
from tests.compile.conftest import CHOSEN, CHOSEN_VARIABLE

triton = pytest.importorskip("triton", reason="NO TRITON: the compile tier is not tested")
tl = pytest.importorskip("triton.language")
pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(triton_support.interpreted(), reason="the interpreter tier runs in this process"),
]
WITHOUT_KERNELS = ("linear", "head_linear")  # cuBLAS's products alone


@triton.jit
def _product_kernel(a_ptr, b_ptr, c_ptr, PRECISION: tl.constexpr):
    """Compute one product, 64 x 64 x 64."""
    offs = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]  # [64, 64]
    c = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), input_precision=PRECISION)
    tl.store(c_ptr + offs, c)


def product(target, dtype, precision, **options):
    a, b = (torch.empty(64, 64, dtype=dtype) for _ in range(2))
    return launch_of(_product_kernel, TARGETS[target], (a, b, torch.empty(64, 64)), {"PRECISION": precision, **options})


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in (*ops(), *composites()) if op not in WITHOUT_KERNELS])
@pytest.mark.parametrize("target", TARGETS)
def test_launches_compile_within_limits(op, target, recording, results):
    if target not in CHOSEN:
        pytest.skip(f"{target}: {CHOSEN_VARIABLE} leaves it out; CI compiles for it")
    found = recording(target)
    assert any(workload.startswith(f"{op} ") for uses in found.launches.values() for workload in uses.workloads)
    lines = limits.broken(found, results, op)
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_a_product_in_tf32_is_noticed(target):
    launches = {name: product(target, torch.float32, name) for name in ("ieee", "tf32")}
    found = {name: compile_launch(launch, TARGETS[target]) for name, launch in launches.items()}
    assert not found["ieee"].reduced and found["tf32"].reduced
    assert limits.problems(launches["tf32"], TARGETS[target], found["tf32"]) == ["multiplies in tf32"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_product_of_16_bits_is_seen_in_the_source_and_as_an_instruction(target):
    launch = product(target, torch.bfloat16, "ieee")
    found = compile_launch(launch, TARGETS[target])
    assert found.dots == (1, 0) and any(name.startswith(TARGETS[target].matrix) for name in found.matrix)
    without = Resources(registers=32, dots=(1, 0))
    assert limits.problems(launch, TARGETS[target], without) == [
        f"no {TARGETS[target].matrix}, which a product of 16-bit operands should be"
    ]


def test_what_is_too_much_is_named():
    launch, target = product("sm_90", torch.float32, "ieee", num_warps=16), TARGETS["sm_90"]
    assert limits.problems(launch, target, Resources(registers=128, shared=target.shared)) == []
    assert limits.problems(launch, target, Resources(registers=129, spilled=8, shared=target.shared + 1)) == [
        "spills 8 bytes",
        f"needs {target.shared + 1} bytes of shared memory, has {target.shared}",
        "takes 129 registers a thread, has 128",
    ]
    assert limits.problems(launch, target, Resources(error="no")) == ["does not compile: no"]


def test_register_limits():
    found = {
        (name, warps): limits.register_limit(TARGETS[name], warps)
        for name in ("sm_90", "gfx942")
        for warps in (4, 8, 16)
    }
    assert found == {
        ("sm_90", 4): 255,
        ("sm_90", 8): 255,
        ("sm_90", 16): 128,
        ("gfx942", 4): 512,
        ("gfx942", 8): 256,
        ("gfx942", 16): 128,
    }


def test_a_waiver_covers_its_launches_alone(recording):
    for waiver in limits.WAIVERS:
        kept = recording(waiver.target)
        covered = [launch for launch in kept.launches if waiver.covers(launch, kept.target)]
        assert covered, f"the waiver of {waiver.kernel} on {waiver.target} covers nothing"
        assert len(covered) < sum(launch.kernel == waiver.kernel for launch in kept.launches)
        assert not any(waiver.covers(launch, TARGETS["gfx942"]) for launch in covered)


def waived():
    """Return a waiver, and a function from what a launch of its takes to what is broken."""
    waiver, target = limits.WAIVERS[0], TARGETS[limits.WAIVERS[0].target]
    kept = record(target, ["norm_linear"])
    launch = next(launch for launch in kept.launches if waiver.covers(launch, target))
    kept.launches = {launch: kept.launches[launch]}
    return waiver, lambda found: limits.broken(kept, {(launch, target.name): found})


def test_a_waiver_excuses_its_spill_alone():
    waiver, broken = waived()
    enough = Resources(registers=32, spilled=waiver.spilled)
    assert broken(enough) == []
    for change, problem in (
        ({"spilled": waiver.spilled + 1}, f"spills {waiver.spilled + 1} bytes"),
        ({"error": "boom"}, "does not compile: boom"),
        ({"shared": 10**7}, "needs 10000000 bytes of shared memory"),
        ({"registers": 300}, "takes 300 registers a thread"),
        ({"reduced": True}, "multiplies in tf32"),
        ({"dots": (1, 0)}, "no mma.sync"),
    ):
        (line,) = broken(replace(enough, **change))
        assert problem in line and "waiver" not in line, line
        assert line.startswith(f"{waiver.kernel} on {waiver.target}: ") and "launched by norm_linear " in line


def test_a_waiver_that_nothing_needs_is_a_problem():
    waiver, broken = waived()
    (line,) = broken(Resources(registers=32))
    assert f"needs no waiver any more ({waiver.reason})" in line
    (line,) = broken(Resources(error="boom"))
    assert "boom" in line and "waiver" not in line
