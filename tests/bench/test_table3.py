"""The command: flags, rows, files, claims. No 13B model is followed here."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as bench
from bench.measure.footprint import Footprint
from bench.records import environment
from bench.table3 import formulas, methods, paper, prefill
from bench.table3 import output as table3_output
from bench.table3 import run as table3
from bench.table3.prefill import Case, Measured, RunRequest, measure_prefill
from bench.table3.rows import Protocol, Report, Row, growth_claim, memory_claim, predicted_row, tracker_claim
from bench.workloads import images

ROW_KEYS = {
    "resolution",
    "method",
    "flops",
    "macs",
    "memory_bytes",
    "memory_kind",
    "fits",
    "prefill_ms",
    "paper_flops_t",
    "paper_memory_gb",
}
BAD_OPTIONS = [
    (["--methods", "basline"], r"--methods: must be among .*got 'basline'; did you mean baseline"),
    (["--attention", "flash"], r"--attention: must be among eager, sdpa, got 'flash'"),
    (["--unit", "mac"], r"--unit: must be among flops, macs, got 'mac'; did you mean macs"),
    (["--dtype", "bf61"], r"--dtype: must be among fp32, bf16, fp16, got 'bf61'; did you mean bf16"),
    (["--resolutions", "448", "big"], r"--resolutions: must be a whole number from 224 to 16384, got 'big'"),
    (["--resolutions", "100"], r"--resolutions: must be a whole number from 224 to 16384, got '100'"),
    (["--card-gb", "-3"], r"--card-gb: must be more than 0, got -3"),
    (["--images-per-sample", "0"], r"--images-per-sample: must be from 1 to 64, got 0"),
    (["--images", "/nowhere"], r"--images: must be a folder with .*got /nowhere"),
    (["--host-config", "/nowhere.json"], r"/nowhere.json"),
    (["--device", "gpu"], r"--device: must be among auto, cpu, cuda, got 'gpu'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[" ".join(options) for options, _ in BAD_OPTIONS])
def test_bad_options_are_named_with_what_is_allowed(options, message, capsys):
    assert bench.main(["table3", *options]) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


@pytest.fixture
def options_of(monkeypatch):
    """Parse a command line; nothing is run."""

    def parse(*arguments):
        seen = []
        monkeypatch.setattr(table3, "run", lambda options, **places: seen.append((options, places)) or 0)
        assert bench.main(["table3", *map(str, arguments)]) == 0
        return seen[0]

    return parse


def test_options_reach_the_protocol(options_of, tmp_path):
    config = tmp_path / "config.json"
    fields = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2}
    config.write_text(json.dumps({"model_type": "llama", **fields, "vocab_size": 100}))
    counted = ("--methods", "hia,baseline", "--attention", "sdpa", "--resolutions", "896,448", "--unit", "macs")
    options, places = options_of(*counted, "--card-gb", "24", "--host-config", config, "--no-measure", "--record")
    assert options.methods == ("baseline", "hia")
    assert options.resolutions == (448, 896)
    assert options.skip_measured
    protocol = options.protocol
    assert (protocol.unit, protocol.attention, protocol.card_bytes) == ("macs", ("sdpa",), 24 * 10**9)
    assert protocol.host.text["num_key_value_heads"] == 2
    assert protocol.host.image_token == 100
    assert places == {"out": None, "record": True, "json": None, "resume": False}


def test_defaults_are_the_protocol_of_the_readme(options_of):
    options, places = options_of("--device", "cpu")
    assert options.protocol == Protocol()
    assert options.methods == methods.METHODS and options.resolutions == table3.RESOLUTIONS
    assert not options.skip_measured and options.device == "cpu"
    assert places == {"out": None, "record": False, "json": None, "resume": False}, "out/<device>, which git ignores"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be a JSON file"),
        ("[]", "must hold a JSON object, got list"),
        ('{"model_type": "gpt2"}', "model_type must be 'llama', got 'gpt2'"),
        ('{"hidden_size": 8}', "got none for intermediate_size"),
    ],
)
def test_bad_host_configs(content, message, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(content)
    assert bench.main(["table3", "--host-config", str(path)]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def row(method: str, resolution: int, flops: int, gigabytes: float, attention: str = "eager") -> Row:
    footprint = Footprint(flops, {}, round(gigabytes * 1e9), 26 * 10**9)
    return predicted_row((resolution, method, attention), footprint, flops, flops, 1212, Protocol(attention=("eager",)))


ROWS = [
    row("baseline", 448, 60 * 10**12, 30.0),
    row("baseline", 896, 270 * 10**12, 61.0),
    row("hia", 448, 33 * 10**12, 29.0),
    row("hia", 896, 33_500_000_000_000, 29.4),
]


def test_claims_pass_and_fail_with_the_numbers():
    assert growth_claim(ROWS, "hia", "eager").passed is True
    assert growth_claim(ROWS, "baseline", "eager").passed is True
    assert memory_claim(ROWS, "eager").passed is True
    worse = [*ROWS[:3], row("hia", 896, 34 * 10**12, 30.5)]
    assert growth_claim(worse, "hia", "eager").passed is False
    assert memory_claim(worse, "eager").passed is False
    flat = [*ROWS[2:], ROWS[0], row("baseline", 896, 239 * 10**12, 61.0)]
    assert growth_claim(flat, "baseline", "eager").passed is False
    assert growth_claim(ROWS[:1], "hia", "eager").passed is None
    assert tracker_claim([]).passed is None


def test_strips_are_said_where_the_table_has_them():
    for resolution, said in ((2016, False), (4096, True)):
        report = Report(Protocol(attention=("eager",)), rows=[row("hia", resolution, 10**13, 29.9)])
        table3_output.add_notes(report, "")
        assert any("takes 4096 px in strips" in note for note in report.notes) == said


def test_layers_are_what_is_counted_less_host_and_encoder(tmp_path):
    protocol, rows = Protocol(attention=("eager",)), []
    for method in ("hia", "released"):
        flops = formulas.prefill_flops(method, protocol.host, 896, 2, 60)
        footprint = Footprint(flops, {}, 29 * 10**9, 26 * 10**9)
        rows.append(predicted_row((896, method, "eager"), footprint, flops, flops, 1212, protocol))
    report = Report(protocol, rows=rows)
    (found,) = report.layers()
    assert found.hia == formulas.layers_flops("hia", protocol.host, 896, 2)
    assert found.ratio == pytest.approx(0.61, abs=0.005)
    line = "FLOPs of the HiA layers without the CNN, hia / released: 896 px 0.61."
    assert table3_output.layer_lines(report) == [line]
    assert line in table3_output.to_markdown(report, None)
    assert report.to_dict()["layers"][0]["ratio"] == found.ratio
    assert Report(protocol, rows=rows[:1]).layers() == []


@pytest.mark.parametrize(("predicted", "passed"), [(0.96, True), (0.94, False), (1.06, False)])
def test_tracker_claim_is_5_percent(predicted, passed):
    measured = table3._measured_row(ROWS[0], Measured(10**9, "measured", 1.0), round(predicted * 1e9), Protocol())
    assert tracker_claim([measured]).passed is passed


def test_hia_on_a_cpu_may_need_less_than_predicted_and_never_more():
    def row(method, kind, predicted):
        like = replace(ROWS[0], method=method, resolution=448, attention="sdpa")
        return table3._measured_row(like, Measured(100, kind, 1.0), predicted, Protocol())

    less, more = row("hia", "measured: VmHWM", 120), row("hia", "measured: VmHWM", 90)
    claim = tracker_claim([less])
    assert claim.passed and "lower by up to 20.0% of the measured (hia 448 sdpa)" in claim.detail
    assert tracker_claim([more]).passed is False
    assert tracker_claim([row("baseline", "measured: VmHWM", 120), less]).passed is False
    assert tracker_claim([row("hia", "measured: torch.cuda.max_memory_allocated", 120)]).passed is False


def make_report() -> Report:
    report = Report(Protocol(attention=("eager",)), rows=list(ROWS), environment=environment.describe("cpu"))
    report.measured = [table3._measured_row(ROWS[0], Measured(10**9, "measured", 5.0), 10**9, report.protocol)]
    report.measured_host = "a host"
    table3_output.add_notes(report, images.find_images(None).note)
    return report


def test_files_have_the_rows_and_the_papers_figures(tmp_path):
    written = table3_output.write_report(make_report(), tmp_path / "out", tmp_path / "copy.json")
    assert {path.name for path in written} == {"table3.json", "table3.md", "table3.png", "copy.json"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["table3.json", "table3.md", "table3.png"]
    record = json.loads((tmp_path / "out" / "table3.json").read_text())
    assert record == json.loads((tmp_path / "copy.json").read_text())
    assert {"protocol", "environment", "rows", "measured", "claims", "notes"} <= set(record)
    for entry in record["rows"]:
        assert set(entry) >= ROW_KEYS
        assert entry["macs"] * 2 == entry["flops"]
        assert entry["fits"] is (entry["memory_bytes"] <= 32e9)
    by_case = {(entry["method"], entry["resolution"]): entry for entry in record["rows"]}
    assert by_case["hia", 896]["paper_flops_t"] == 16.8
    assert by_case["hia", 896]["paper_memory_gb"] == 30.4
    assert by_case["baseline", 896]["paper_memory_gb"] is None
    assert by_case["baseline", 896]["paper_out_of_memory"] is True
    assert record["environment"]["versions"]["torch"] == torch.__version__
    page = (tmp_path / "out" / "table3.md").read_text()
    assert "| 896 | hia | 1,212 | 33.5 | 16.8 | 8.06 | 12.38 |" in page
    assert "PASS: HiA's FLOPs grow" in page
    assert (tmp_path / "out" / "table3.png").read_bytes()[:4] == b"\x89PNG"


def test_paper_ratios():
    assert paper.flops_ratio(896) == pytest.approx(208 / 16.8)
    assert paper.memory_ratio(448) == pytest.approx(30.8 / 29.6)
    assert paper.memory_ratio(672) is None
    assert paper.figure("anyres", 448) is None


def test_phantoms_where_there_are_no_radiographs(tmp_path, monkeypatch):
    monkeypatch.setenv("HIA_TEST_DATA", str(tmp_path))
    source = images.find_images(None)
    assert source.kind == "phantoms" and "generated phantoms" in source.note
    first, second = source.load(2, 96)
    assert first.shape == (96, 96, 1) and first.dtype is torch.uint8
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="--images: must be a folder with .jpg"):
        images.find_images(tmp_path)
    text = images.prompt_text(60, 32000)
    assert len(text.ids) == 60 and text.tokenizer.startswith("bytes")


def test_real_radiographs_are_cropped_to_squares():
    source = images.find_images(None)
    if source.kind != "radiographs":
        pytest.skip(f"no real radiographs: {source.note}")
    first, second = source.load(2, 112)
    assert first.shape == second.shape == (112, 112, 1)
    assert all(name.startswith("chest") for name in source.names(2))
    assert len(set(first.flatten().tolist())) > 50


def test_requests_survive_json():
    request = RunRequest("hia", {"name": "x", "text": {}, "vision": {}}, "fp32", "cpu", (Case(448, "sdpa", 7),), 2, 60)
    assert RunRequest.from_json(request.to_json()) == request


class OutOfMemory(torch.nn.Module):
    def forward(self, **_inputs):
        raise torch.OutOfMemoryError("provoked")


def test_running_out_of_memory_is_a_result():
    inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
    measured = measure_prefill(OutOfMemory(), inputs, None)
    assert measured.out_of_memory and measured.prefill_ms is None
    made = table3._measured_row(ROWS[1], measured, 61 * 10**9, Protocol())
    assert (made.memory_bytes, made.fits, made.memory_kind) == (None, False, "out of memory, provoked")


@pytest.mark.parametrize(("is_cuda", "expected"), [(True, 81.0), (False, 5000.0)])
def test_a_first_prefill_that_compiles_gives_no_time(is_cuda, expected, monkeypatch):
    """A GPU's kernels are compiled in it, for seconds; on a CPU it is slow because the model is."""
    times = iter((5000.0, 80.0, 82.0, 81.0))
    monkeypatch.setattr(prefill, "_timer", lambda model, inputs: lambda: next(times))
    inputs = {"input_ids": SimpleNamespace(is_cuda=is_cuda)}
    assert measure_prefill(torch.nn.Identity(), inputs, None).prefill_ms == expected


def test_slug():
    assert environment.slug("AMD EPYC 7B13 (2 cores)") == "amd-epyc-7b13-2-cores"
