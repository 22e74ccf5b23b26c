"""``make test``: which pytest each tier is, and what is said of them."""

from __future__ import annotations

import pytest

from tests import tiers
from tests.tiers import NO_TESTS, Ran, Tier

CPU, COMPILE, INTERPRETER = tiers.TIERS


def arguments_of(tier, *extra, workers="1"):
    line = tiers.command(tier, workers, extra)
    return None if line is None else line[3:]


def test_every_test_belongs_to_a_tier():
    assert arguments_of(CPU) == ["--ignore=tests/compile"]
    assert arguments_of(COMPILE) == ["tests/compile"]
    assert arguments_of(INTERPRETER) == ["-m", "interpreter", "--ignore=tests/compile"]


def test_options_go_to_every_tier_and_paths_where_they_lead():
    assert arguments_of(COMPILE, "-k", "stem") == ["-k", "stem", "tests/compile"]
    assert arguments_of(COMPILE, "tests/ops/test_stem.py", "-x") is None
    assert arguments_of(COMPILE, "tests/compile/test_limits.py::test_x") == ["tests/compile/test_limits.py::test_x"]
    assert arguments_of(COMPILE, str(tiers.ROOT / "tests" / "ops")) is None
    assert arguments_of(COMPILE, "bench/compare/test_regression.py") is None
    assert arguments_of(COMPILE, "--deselect", "tests/ops/test_stem.py") == [
        "--deselect",
        "tests/ops/test_stem.py",
        "tests/compile",
    ]
    assert arguments_of(COMPILE, "tests/") == ["tests/compile"]
    assert arguments_of(CPU, "tests/ops", "-x") == ["--ignore=tests/compile", "tests/ops", "-x"]


def test_only_tiers_without_a_pool_of_their_own_are_spread(monkeypatch):
    monkeypatch.setattr(tiers.importlib.util, "find_spec", lambda name: object())
    assert arguments_of(CPU, workers="auto")[:2] == ["-n", "auto"]
    assert "-n" not in arguments_of(COMPILE, workers="auto") and "-n" not in arguments_of(CPU, workers="1")
    monkeypatch.setattr(tiers.importlib.util, "find_spec", lambda name: None)
    assert "-n" not in arguments_of(CPU, workers="auto")


def test_minutes_and_outcomes_are_added_up():
    found = [
        Ran(CPU, 1, 90.0, "2 failed, 30 passed, 4 skipped, 1 error in 89.00s (0:01:29)"),
        Ran(COMPILE, 0, 30.0, "5 passed in 29.00s"),
        Ran(INTERPRETER, NO_TESTS, 0.0, ""),
    ]
    lines = tiers.report(found, "avx2").splitlines()
    assert lines[0].endswith("result (avx2 instructions)") and lines[1].split()[:2] == ["cpu", "1.5"]
    assert lines[3].endswith("no test chosen")
    assert lines[4].split(maxsplit=2) == ["all", "2.0", "35 passed, 2 failed, 1 errors, 4 skipped"]


@pytest.mark.parametrize(
    ("codes", "expected"), [((0, 0), 0), ((0, NO_TESTS), 0), ((1, 0), 1), ((0, 2), 1), ((NO_TESTS, NO_TESTS), NO_TESTS)]
)
def test_one_failed_tier_fails_all_and_nothing_run_is_no_success(codes, expected, monkeypatch, capsys):
    left = list(codes)
    monkeypatch.setattr(tiers, "run", lambda tier, *rest: Ran(tier, left.pop(0), 1.0, ""))
    assert tiers.main(["--tiers", "cpu", "compile"]) == expected
    assert not left, "a failed tier keeps no other from running"


def test_a_tier_runs_in_its_environment_and_its_last_line_is_kept(monkeypatch, tmp_path, capfd):
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_it():\n assert os.environ['HIA_CPU_ISA'] == 'avx2' and os.environ['TOY'] == '1'\n"
        " assert os.environ['TORCHINDUCTOR_CACHE_DIR'].endswith('inductor-avx2')\n"
    )
    monkeypatch.setattr(tiers, "ROOT", tmp_path)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    done = tiers.run(Tier("toy", "a toy", ("-p", "no:cacheprovider"), environment={"TOY": "1"}), "avx2", "1", ())
    assert (done.code, done.counts["passed"]) == (0, 1) and "1 passed in" in done.summary
    assert "== a toy" in capfd.readouterr().out


def test_help_names_the_choices(capsys):
    with pytest.raises(SystemExit):
        tiers.parser().parse_args(["--help"])
    printed = capsys.readouterr().out
    assert "cpu, compile, interpreter" in printed and "exit codes" in printed
