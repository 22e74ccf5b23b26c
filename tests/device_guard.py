"""A pytest plugin for GPUs (``-p tests.device_guard``): a device that failed fails one test, not all that follow.

After an illegal access every CUDA call of a process fails. The test that caused it is the one whose work is waited for
when the error shows, so each test waits for the device; then the worker of pytest-xdist ends, and another takes over.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch

CACHED_BYTES = 2**31  # kept by a worker's allocator beyond a test; the workers share one device
_broken: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Wait for the device behind a test: what its kernels did wrong is its own failure."""
    try:
        return (yield)
    finally:
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                _broken.append(item.nodeid)
                raise
            if torch.cuda.memory_reserved() > CACHED_BYTES:
                torch.cuda.empty_cache()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """End a worker whose device failed, once its report is out."""
    if _broken and os.environ.get("PYTEST_XDIST_WORKER"):
        os._exit(9)
