"""Fixtures of the ops' tests: uninitialised memory holds NaN, so that a result left unwritten shows."""

from __future__ import annotations

import pytest
import torch

from bench.measure.poison import poison_uninitialised
from hia_kernels.core import triton_support


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_uninitialised(monkeypatch.setattr)


@pytest.fixture(scope="session")  # so that property tests may ask for it
def triton_device() -> str:
    """Return where Triton kernels run: the GPU, or the CPU in the interpreter's process."""
    if triton_support.interpreted():
        return "cpu"
    if torch.cuda.is_available() and not triton_support.unavailable_reasons():
        return "cuda"
    pytest.skip("TRITON KERNELS: neither a CUDA device nor TRITON_INTERPRET=1; make test runs them in a second process")
