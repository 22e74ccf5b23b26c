"""Profiles of a call: the table adds up, and bad values are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from bench.__main__ import main as bench
from bench.profile.run import table
from bench.records import files


def test_prints_a_table_of_a_composite(capsys):
    assert bench(["profile", "adapter_train_step", "tiny", "--device", "cpu", "--rows", "3"]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == 3 and "| together |" in text
    assert "hia, both, fp32; " in text and "`python -m bench profile" in text
    (written,) = files.OUT.glob("*/profiles/adapter_train_step-tiny-hia.md")
    assert written.read_text() in text


def test_prints_shapes_and_the_backend_of_an_op(capsys):
    assert bench(["profile", "linear", "tiny", "--device", "cpu", "--shapes", "--role", "output"]) == 0
    text = capsys.readouterr().out
    assert "hia (cpu), forward, fp32; " in text and "`hia::linear` [[" in text


def test_the_rest_is_in_the_sum():
    events = [
        SimpleNamespace(key=name, count=1, self_cpu_time_total=us)
        for name, us in (("a", 1000.0), ("c", 250.0), ("b", 2750.0))
    ]
    text = table(events, "cpu", 1, shapes=False)
    assert "| `b` | 1 | 2.75 | 68.8% |" in text and "| 2 more |  | 1.25 | 31.2% |" in text
    assert text.endswith("| together |  | 4 |  |")


def test_a_kernel_is_counted_once():
    """PyTorch gives the op that launched it the same time."""
    events = [
        SimpleNamespace(key="hia::op", count=1, self_device_time_total=23.45, device_type=DeviceType.CPU),
        SimpleNamespace(key="_kernel", count=1, self_device_time_total=23.45, device_type=DeviceType.CUDA),
    ]
    text = table(events, "cuda", 4, shapes=False)
    assert "hia::op" not in text and "| `_kernel` | 1 | 0.02345 | 100.0% |" in text
    assert "| together |  | 0.02345 |  |" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["linear", "nothing"], "case: must be one of "),
        (["linear", "tiny", "--role", "nobody"], "--role: must be among features, output, got 'nobody'"),
        (["linear", "tiny", "--provider", "nobody"], "--provider: must be among hia, "),
        (
            ["linear", "tiny", "--provider", "hia-cublas", "--device", "cpu"],
            "got hia-cublas",
        ),
        (["linear", "tiny", "--rows", "0"], "--rows: must be at least 1, got 0"),
    ],
)
def test_bad_values_are_refused(flags, message, capsys):
    assert bench(["profile", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("given", [["stem"], ["--role", "x"], ["--mode", "both"], ["--provider", "eager"]], ids=str)
def test_the_furthest_are_chosen_by_nothing_else(given, capsys):
    assert bench(["profile", *given, "--furthest", "1", "--device", "cpu"]) == 2
    assert "--furthest: must not be given with" in capsys.readouterr().err
