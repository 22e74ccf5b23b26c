"""Files are replaced whole or not at all."""

from __future__ import annotations

import pytest

from bench.records.files import replacing


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "table3.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(path) as scratch:
        scratch.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_for_everybody(tmp_path):
    with replacing(tmp_path / "folder" / "table3.json") as scratch:
        scratch.write_text("new")
    (path,) = (tmp_path / "folder").iterdir()
    assert path.read_text() == "new" and path.stat().st_mode & 0o444 == 0o444
