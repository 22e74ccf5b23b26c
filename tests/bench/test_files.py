"""Results on disk, in the terminal and in Markdown: whole files, a line now and then, tables that hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.progress import Progress
from bench.records import files, markdown
from bench.records.files import BadFile, read_json, replacing, results_folder, write_json, write_text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"ü": [1, 2.5]})
    assert read_json(path) == {"ü": [1, 2.5]} and path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(RuntimeError), replacing(path) as scratch:
        scratch.write_text("half")
        assert scratch.suffix == ".json" and path.read_text().endswith("}\n")
        raise RuntimeError
    assert read_json(path) == {"ü": [1, 2.5]} and [one.name for one in path.parent.iterdir()] == ["a.json"]
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, float("nan"))
    write_text(path, "[1")
    with pytest.raises(BadFile, match=r"a.json must be a JSON file, got: "):
        read_json(path)


def test_results_go_to_out_unless_they_are_records(tmp_path):
    assert results_folder("A GPU, 80 GB") == files.OUT / "a-gpu-80-gb"
    assert results_folder("A GPU", record=True) == files.RESULTS / "a-gpu"
    assert results_folder("A GPU", record=True, out=tmp_path) == tmp_path


def test_paths_are_shown_from_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.shown(tmp_path / "out" / "a.json") == "out/a.json"
    assert files.shown(Path("/elsewhere/a.json")) == "/elsewhere/a.json"


def test_a_table_in_markdown():
    lines = markdown.table(("op", "ms", "note"), [("a|b", 1.5, "two\nlines"), ("c", 2, "")], text=("op", 2))
    assert lines == [
        "| op | ms | note |",
        "| --- | ---: | --- |",
        "| a\\|b | 1.5 | two lines |",
        "| c | 2 |  |",
    ]


def test_without_a_terminal_a_line_comes_now_and_then(capsys):
    seconds = [0.0]
    with Progress(4, now=lambda: seconds[0]) as progress:
        for number in range(4):
            progress.step(f"task {number}")
            for _ in range(4):
                seconds[0] += 5.0
                progress.detail("checking")
            progress.done()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "[1/4] 30 s, about 90 s left: task 1: checking",
        "[2/4] 60 s, about 60 s left: task 2: checking",
    ] or (lines[0] == "[1/4] 30 s, about 90 s left: task 1: checking" and len(lines) == 2)


def test_a_deadline_is_what_is_left(capsys):
    seconds = [0.0]
    with Progress(2, now=lambda: seconds[0], left=lambda: 500.0 - seconds[0]) as progress:
        seconds[0] = 31.0
        progress.step("first")
    assert capsys.readouterr().err == "[0/2] 31 s, about 469 s left: first\n"


def test_a_short_run_says_nothing(capsys):
    with Progress(1) as progress:
        progress.step("first")
        progress.done()
    assert capsys.readouterr().err == ""
