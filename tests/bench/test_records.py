"""Records: what they hold, and how they come to and from the disk."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bench.records.record import Measurement, read_records, write_records

RECORD = Measurement(
    "op",
    "stem",
    "px224",
    "hia",
    "forward",
    "fp32",
    "cpu",
    "ok",
    p20_ms=1.0,
    p50_ms=2.0,
    p80_ms=3.0,
    repeats=5,
    flops=10,
    bytes=20,
    roofline_ms=0.5,
    percent_of_roofline=25.0,
    peak_bytes=7,
    extra={"error": 1e-7},
    environment={"device": "a CPU", "commit": None, "dirty": False},
)


def test_records_survive_a_file(tmp_path):
    red = replace(RECORD, provider="other", status="failed", reason="no", p20_ms=None, p50_ms=None, p80_ms=None)
    path = write_records(tmp_path / "deep" / "kernels.json", [RECORD, red])
    assert read_records(path) == [RECORD, red]
    assert [file.name for file in path.parent.iterdir()] == ["kernels.json"], "no partial file is left"
    assert len(json.loads(path.read_text())["environments"]) == 1
    write_records(path, [red])
    assert read_records(path) == [red], "nothing is merged"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "sideways"}, "mode must be forward or backward or both or dispatch, got 'sideways'"),
        ({"p50_ms": None}, "status 'ok' must have p20_ms, p50_ms, p80_ms and no reason"),
        ({"status": "failed"}, "status 'failed' must have a reason and no times"),
        ({"flops": -1}, "flops must be a whole number of at least 0, got -1"),
        ({"p80_ms": float("nan")}, "p80_ms must be a number of at least 0, got nan"),
        ({"op": ""}, "op must be a name, got ''"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_records_are_checked(changes, message):
    with pytest.raises(ValueError) as error:
        replace(RECORD, **changes)
    assert message in str(error.value)


def test_files_that_hold_something_else(tmp_path):
    values = RECORD.to_dict()
    with pytest.raises(ValueError, match=r"got unknown \['speed'\], missing \['op'\]"):
        Measurement.from_dict({name: value for name, value in values.items() if name != "op"} | {"speed": 1})
    path = tmp_path / "kernels.json"
    path.write_text("[1")
    with pytest.raises(ValueError, match="must be a JSON file"):
        read_records(path)
    path.write_text('{"format": 9}')
    with pytest.raises(ValueError, match="must hold an object of format 1, got 9"):
        read_records(path)
    path.write_text('{"format": 1, "environments": [], "records": [{"environment": 0}]}')
    with pytest.raises(ValueError, match="record 0"):
        read_records(path)
