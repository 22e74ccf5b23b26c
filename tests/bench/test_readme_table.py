"""README.md's Table 3 is the committed record's."""

from __future__ import annotations

import json

import pytest

from bench import __main__ as bench
from bench.table3 import readme


def record() -> dict:
    return json.loads(readme.RECORD.read_text())


def test_readme_shows_the_record():
    text = readme.README.read_text()
    assert readme.table(record()) in text, "README.md is older than its record; run python -m bench table3 --readme"


def test_the_record_is_of_a_clean_commit_and_passed():
    found = record()
    assert found["environment"]["dirty"] is False
    assert len(found["environment"]["commit"]) == 40
    assert found["claims"]
    assert all(claim["passed"] for claim in found["claims"])


def test_updating_is_idempotent():
    once = readme.updated(readme.README.read_text(), record())
    assert readme.updated(once, record()) == once


def test_changed_figures_are_seen():
    changed = record()
    changed["rows"][0]["flops"] *= 2
    assert readme.table(changed) not in readme.README.read_text()


def test_layers_are_compared_where_the_record_has_them():
    found = {**record(), "layers": [{"resolution": 896, "hia": 61, "released": 100, "ratio": 0.61}]}
    assert "HiA layers without the CNN, ours over the released maths': 896 px 0.61." in readme.block(found)
    assert "without the CNN" not in readme.block({**found, "layers": []})


def test_missing_markers():
    with pytest.raises(ValueError, match=r"README.md must hold <!-- table3"):
        readme.updated("# no table\n", record())


def test_the_command_renews_the_readme(tmp_path, monkeypatch, capsys):
    readme_file = tmp_path / "README.md"
    readme_file.write_text(readme.README.read_text().replace(readme.table(record()), "an older table"))
    monkeypatch.setattr(readme, "README", readme_file)
    assert bench.main(["table3", "--readme"]) == 0
    assert readme.table(record()) in readme_file.read_text()
    assert "README.md: Table 3 from bench/results/amd-epyc/table3.json" in capsys.readouterr().out
