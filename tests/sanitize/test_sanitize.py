"""``make test-sanitize``: what it does without compiling; the campaign itself proves that it sees faults."""

from __future__ import annotations

import re

import pytest

from tests.sanitize import __main__ as campaign
from tests.sanitize import build


def test_no_compiler_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.CannotSanitize, match="a C\\+\\+ compiler is needed, got no no-such-compiler"):
        build.compiler()


def test_a_compiler_without_sanitizers_is_an_error_that_says_so(monkeypatch, tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho 'unrecognized option -fsanitize=address' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.CannotSanitize, match="must have AddressSanitizer .* got: unrecognized option"):
        build.compiler()
    assert campaign.main([]) == 2


def test_every_broken_function_has_a_control():
    source = (build.ROOT / "tests" / "sanitize" / "broken.cpp").read_text(encoding="utf-8")
    assert set(re.findall(r'm\.def\("(\w+)', source)) == set(campaign.CONTROLS)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("==7==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x1", 1),
        ("gemm.h:7:3: runtime error: shift exponent 37 is too large\ngemm.h:9:3: runtime error: load of", 2),
        ("", 0),
    ],
)
def test_reports_are_counted(text, count, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "REPORTS", tmp_path)
    (tmp_path / "random-calls-avx2.17").write_text(text)
    assert campaign.show_reports("random calls, avx2") == count


def test_the_tests_that_it_runs_exist():
    assert not [name for name in campaign.TESTS if not (build.ROOT / name).is_file()]
