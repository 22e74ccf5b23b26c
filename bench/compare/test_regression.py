"""The small CPU set under pytest-benchmark: ``python -m pytest bench/compare/test_regression.py``.

Not part of ``make test``, whose folder is ``tests``. ``--benchmark-save`` and ``--benchmark-compare`` work as usual;
``make bench-compare`` is the fairer comparison, since it measures both revisions in one session.
"""

from __future__ import annotations

import pytest

from bench.compare.regression import cases, make_call

pytest.importorskip("pytest_benchmark", reason="NO BENCHMARKS: pytest-benchmark is not installed")


@pytest.mark.parametrize("case", cases())
def test_regression(benchmark, case):
    benchmark.group = case.partition(":")[0]
    call = make_call(case)
    call()
    benchmark(call)
