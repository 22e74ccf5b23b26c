"""An op that nobody needs, for the tests of what a new op brings."""

from __future__ import annotations

import importlib

import pytest

from bench import workloads
from hia_kernels.core import backend

OP = "row_dot"


@pytest.fixture
def toy():
    """The op known as ours are, during a test: its table to dispatch, its entry to what is measured."""
    library = importlib.import_module("tests.bench.toy_op.library")
    entry = importlib.import_module("tests.bench.toy_op.workload").ENTRY
    backend.TABLES[OP] = library.BACKENDS
    workloads.register(entry)
    yield entry
    workloads.unregister(OP)
    del backend.TABLES[OP]
