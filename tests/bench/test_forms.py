"""Forms beside each other: every form runs and agrees, errors are of rounding, and bad values are refused."""

from __future__ import annotations

import pytest

from bench.__main__ import main as bench
from bench.forms import encoder
from hia.encoder import memory


def test_prints_a_row_a_form(capsys):
    before = memory.LARGE_MAP
    flags = ["--px", "300", "--width", "8", "--seconds", "0.1", "--budget-mib", "9"]
    assert bench(["encoder-forms", *flags]) == 0 and before == memory.LARGE_MAP
    text = capsys.readouterr().out
    for form in encoder.FORMS:
        assert f"| 300 | {form} |" in text
    assert "`python -m bench encoder-forms --px 300" in text and "torch" in text


def test_features_that_differ_fail_the_run(monkeypatch, capsys):
    right = encoder.calls_of

    def wrong(*args):
        calls = right(*args)
        return {**calls, "strips": lambda: calls["strips"]() * 1.001}

    monkeypatch.setattr(encoder, "calls_of", wrong)
    flags = ["--px", "64", "--width", "8", "--seconds", "0.1", "--form", "whole", "strips"]
    assert bench(["encoder-forms", *flags]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--px", "9"], "--px: must be from 64 to 8192, got 9"),
        (["--budget-mib", "0"], "--budget-mib: must be at least 1, got 0"),
        (["--budget-mib", "2"], "--budget-mib: "),
        (["--seconds", "-1"], "--seconds: must be more than 0, got -1"),
        (["--form", "hole"], "--form: must be among parameters, whole, .* got 'hole'; did you mean whole"),
    ],
)
def test_bad_values_are_refused(flags, message, capsys):
    assert bench(["encoder-forms", *flags]) == 2
    assert capsys.readouterr().err.startswith("bench encoder-forms: " + message.partition(" .*")[0])


def test_deep_forms_are_as_exact_as_the_direct_one(capsys):
    sizes = ["--channels", "64", "--dim", "64", "--queries", "8", "--heads", "4"]
    assert bench(["deep-forms", "--tokens", "96", *sizes, "--exact", "fp64"]) == 0
    text = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ln_")]
    assert [row[0].strip() for row in rows] == ["ln_folded_kv", "ln_folded_absorbed"]
    assert all(0 < float(row[4]) < 4 * float(row[5]) < 0.2 for row in rows)
    assert "8 queries, 4 heads, rectified features, bf16 against fp64" in text
    assert bench(["deep-forms", "--channels", "33"]) == 2
    assert "--channels: must be a multiple of 32, got 33" in capsys.readouterr().err
