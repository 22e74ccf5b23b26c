"""A pytest plugin that collects tests as on a GPU, where there is none (``-p tests.pretend_gpu --collect-only``)."""

from __future__ import annotations

import pytest

from bench.launches.device import TARGETS, fake_device

_device = fake_device(TARGETS["sm_90"])
_device.__enter__()  # before any conftest.py asks for devices


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--collect-only"):
        raise pytest.UsageError("tests.pretend_gpu: must be given with --collect-only: nothing can run on its device")


def pytest_unconfigure() -> None:
    _device.__exit__(None, None, None)
