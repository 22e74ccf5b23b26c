"""Compile tier: every Triton kernel for every target, without a GPU."""

from __future__ import annotations

import pytest

from bench import compiled
from hia_kernels.core import triton_support

pytest.importorskip("triton", reason="NO TRITON: the compile tier is not tested")
pytestmark = pytest.mark.skipif(triton_support.interpreted(), reason="the interpreter tier runs in this process")

CASES = [pytest.param(spec, target, id=f"{spec.name}-{target}") for spec in compiled.specs() for target in spec.targets]


@pytest.mark.parametrize(("spec", "target"), CASES)
def test_compiles_within_limits(spec, target):
    found = compiled.compile_spec(spec, target)
    wrong = compiled.problems(spec, target, found)
    if target in spec.waived:
        assert wrong, f"{spec.name} is waived on {target} ({spec.waived[target]}) and needs no waiver"
    else:
        assert not wrong, f"{spec.name} on {target}: {', '.join(wrong)}; {found}"


def test_every_spec_has_its_own_name():
    names = [spec.name for spec in compiled.specs()]
    assert len(names) == len(set(names))
