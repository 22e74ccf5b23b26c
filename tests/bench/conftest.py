"""Fixtures of the benchmarks' tests: an op that nobody needs, and results that stay out of the checkout."""

from __future__ import annotations

import importlib

import pytest

from bench import workloads
from bench.records import files
from hia_kernels.core import backend
from tests.bench import made_up

OP = "row_dot"


@pytest.fixture(autouse=True)
def results_elsewhere(tmp_path, monkeypatch):
    """Send what would go to out/ and bench/results to a folder of the test's."""
    monkeypatch.setattr(files, "OUT", tmp_path / "checkout" / "out")
    monkeypatch.setattr(files, "RESULTS", tmp_path / "checkout" / "bench" / "results")


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


@pytest.fixture
def results(tmp_path):
    """The folder of a made-up device's folder."""
    made_up.write_results(tmp_path / "results" / "made-up-cpu")
    return tmp_path / "results"


@pytest.fixture
def written(results, tmp_path):
    """The report of it."""
    assert made_up.run("--results", results, "--out", tmp_path / "out") == 0
    return tmp_path / "out"
