"""The encoder's forms beside each other: every form runs, agrees, and bad values are refused."""

from __future__ import annotations

import pytest

from bench.ops import encoder_forms
from hia.encoder import strips


def test_prints_a_row_a_form(capsys):
    before = strips.LARGE_MAP
    flags = ["--px", "300", "--width", "8", "--seconds", "0.1", "--budget-mib", "9"]
    assert encoder_forms.main(flags) == 0 and before == strips.LARGE_MAP
    text = capsys.readouterr().out
    for form in encoder_forms.FORMS:
        assert f"| 300 | {form} |" in text
    assert "`python -m bench encoder-forms" in text and "torch" in text


def test_features_that_differ_fail_the_run(monkeypatch, capsys):
    right = encoder_forms.calls_of

    def wrong(*args):
        calls = right(*args)
        return {**calls, "strips": lambda: calls["strips"]() * 1.001}

    monkeypatch.setattr(encoder_forms, "calls_of", wrong)
    assert encoder_forms.main(["--px", "64", "--width", "8", "--seconds", "0.1", "--form", "whole", "strips"]) == 1


@pytest.mark.parametrize(
    "flags", [["--px", "9"], ["--budget-mib", "0"], ["--budget-mib", "2"], ["--seconds", "-1"], ["--form", "hole"]]
)
def test_bad_values_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        encoder_forms.parse(flags)
    assert flags[0] in capsys.readouterr().err
