"""Seeded faults, one module an area; ``tests/mutants.py`` applies them one by one and wants each to be caught."""

from __future__ import annotations

from . import bench, contracts, gpu_run, learning, native, operators, runtime, triton_kernels
from .mutant import KINDS, REQUIRED_KINDS, Mutant, StaleFault

MUTANTS: tuple[Mutant, ...] = (
    *triton_kernels.MUTANTS,
    *operators.MUTANTS,
    *contracts.MUTANTS,
    *native.MUTANTS,
    *runtime.MUTANTS,
    *learning.MUTANTS,
    *bench.MUTANTS,
    *gpu_run.MUTANTS,
)

__all__ = ["KINDS", "MUTANTS", "REQUIRED_KINDS", "Mutant", "StaleFault"]
