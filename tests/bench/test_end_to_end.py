"""End to end on a tiny host: every provider's every figure, batches, deadlines, bad flags."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from bench import __main__ as bench
from bench.end_to_end import plan as planning
from bench.end_to_end import run as end_to_end
from bench.end_to_end import subjects as run
from bench.end_to_end.subjects import Case, Setting, Subject
from bench.measure.memory import Memory
from bench.measure.roofline import Limits
from bench.records.record import read_records
from bench.table3 import hosts
from bench.table3.hosts import HostSpec
from bench.workloads import images

TEXT = {
    **hosts.SMALL_LLM,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
VISION = {
    **hosts.SMALL_VIT,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TINY = HostSpec("tiny LLaVA", TEXT, VISION)
BAD_OPTIONS = [
    (["--provider", "hai"], "--provider: must be among plain, baseline, .*, got 'hai'; did you mean hia"),
    (["--op", "decod"], "--op: must be among .*, got 'decod'; did you mean decode"),
    (["--resolutions", "100"], "--resolutions: must be a whole number from 224 to 8192, got '100'"),
    (["--batch", "0"], "--batch: must be a whole number from 1 to 64, got '0'"),
    (["--dtype", "fp8"], "--dtype: must be among fp32, bf16, fp16, got 'fp8'"),
    (["--text-tokens", "7"], "--text-tokens: must be from 8 to 4096, got 7"),
    (["--deadline", "soon"], "--deadline: must be a whole number, got 'soon'"),
]


def command(*arguments) -> int:
    return bench.main(["end-to-end", *map(str, arguments)])


@pytest.fixture
def phantoms():
    return images.ImageSource("phantoms", (), "phantoms")


@pytest.fixture
def setting(phantoms):
    text = tuple(range(3, 23))
    return Setting(TINY, torch.float32, "cpu", "sdpa", phantoms, text, new_tokens=2, checkpointing=False)


@pytest.fixture
def tiny_run(monkeypatch, phantoms):
    monkeypatch.setattr(end_to_end, "SMALL_LLAVA", TINY)
    monkeypatch.setattr(end_to_end.roofline, "measure", lambda *_: Limits(1e10, {"fp32": 1e11}))
    monkeypatch.setattr(planning.pictures, "find_images", lambda _folder: phantoms)
    monkeypatch.setattr(end_to_end, "process_peak_unavailable", lambda: "not in this process: malloc would stay slow")


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[" ".join(options) for options, _ in BAD_OPTIONS])
def test_bad_options(options, message, capsys):
    assert command(*options, "--device", "cpu") == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_the_most_important_come_first(monkeypatch):
    seen = []
    monkeypatch.setattr(end_to_end, "run", lambda options, **places: seen.append((options, places)) or 0)
    assert command("--device", "cpu") == 0
    ((options, places),) = seen
    assert places == {"out": None, "record": False, "json": None, "resume": False}, "out/<device>, which git ignores"
    steps = planning.plan(options)
    assert steps[0] == (Case("time_to_first_token", 448, 1, 2), ("hia", "baseline", "released", "anyres", "plain"))
    sizes = [case.batch * case.resolution**2 for case, _ in steps]
    assert sizes == sorted(sizes)
    assert options.deadline == planning.CPU_DEADLINE_S and options.dtype == "fp32"
    alone = planning.plan(dataclasses.replace(options, device="cuda"))
    assert all(len(providers) == 1 for _, providers in alone)
    assert [providers[0] for _, providers in alone[: len(steps) // 2]] == ["hia"] * (len(steps) // 2)


@pytest.mark.parametrize("provider", run.PROVIDERS)
def test_a_batch_is_its_prompts_side_by_side(provider, setting):
    if run.not_offered(provider, Case("time_to_first_token", 224, 2, 2)):
        pytest.skip("takes one prompt at a time")
    model = run.build(provider, setting)
    if provider == "hia":  # a new adapter injects nothing, and would hide mixed-up images
        model.unfold_weights()
        for parameter in model.adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    pair = Subject(provider, model, setting, Case("time_to_first_token", 224, 2, 1))
    together = model(**pair.inputs).logits.detach()
    pictures = setting.source.load(2, run.resolution_seen(provider, 224))
    for number in range(2):
        sample = run.methods.Sample(pictures[number : number + 1], setting.text)
        alone = model(**run.methods.make_inputs(run.method_of(provider), model, TINY, sample)).logits.detach()
        torch.testing.assert_close(together[number], alone[0], rtol=1e-3, atol=1e-3)


def test_plain_reads_the_image_at_336(setting):
    case = Case("time_to_first_token", 224, 1, 2)
    subject = Subject("plain", run.build("plain", setting), setting, case)
    assert subject.inputs["pixel_values"].shape[-1] == 336
    assert subject.tokens == 20 + 2 * 576


def test_second_question_is_the_first_ones_prefill_without_its_encoder(setting):
    model = run.build("hia", setting)
    first, second = (Subject("hia", model, setting, Case(op, 224, 1, 2)) for op in run.OPS[:2])
    assert "high_res_pixels" not in second.inputs
    with torch.no_grad():
        torch.testing.assert_close(model(**second.inputs).logits, model(**first.inputs).logits)


def test_decoding_starts_from_the_same_cache_every_time(setting):
    subject = Subject("hia", run.build("hia", setting), setting, Case("decode", 224, 1, 1))
    assert len(subject.repetition()) == setting.new_tokens
    length = int(subject._cache.get_seq_length())
    subject.repetition()
    assert int(subject._cache.get_seq_length()) == length == subject.tokens


@pytest.mark.parametrize(
    ("provider", "checkpointing"),
    [*((provider, False) for provider in run.PROVIDERS), ("hia", True), ("released", True), ("plain", True)],
)
def test_a_training_step_changes_what_is_trained_and_nothing_else(provider, checkpointing, setting):
    setting = Setting(**{**setting.__dict__, "checkpointing": checkpointing})
    model = run.build(provider, setting)
    subject = Subject(provider, model, setting, Case("train_step", 224, 1, 1))
    trained = {id(parameter) for parameter in subject.trained()}
    before = {name: value.clone() for name, value in model.named_parameters()}
    subject.repetition()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert changed <= {name for name, value in model.named_parameters() if id(value) in trained}
    subject.close()
    assert not model.training
    assert not any(value.requires_grad or value.grad is not None for value in model.parameters())


def test_run_writes_every_figure(tiny_run, tmp_path, capsys):
    flags = [
        "--device",
        "cpu",
        "--resolutions",
        "224",
        "--batch",
        "1",
        "--images-per-prompt",
        "1",
        "--text-tokens",
        "40",
        "--new-tokens",
        "2",
        "--repeats",
        "2",
        "--budget",
        "1",
        "--provider",
        "hia",
        "plain",
        "--out",
        str(tmp_path),
    ]
    assert command(*flags) == 0
    records = read_records(tmp_path / "end_to_end.json")
    found = {(record.op, record.provider): record for record in records}
    assert len(found) == len(records) == len(run.OPS) * 2
    for (op, provider), record in found.items():
        offered = op != "second_question" or provider == "hia"
        assert record.status == ("ok" if offered else "unavailable"), f"{op} {provider}: {record.reason}"
        assert record.extra["resolution_seen"] == (336 if provider == "plain" else 224)
    assert found["decode", "hia"].extra["tokens_per_s"] > 0
    assert found["time_to_first_token", "hia"].percent_of_roofline > 0
    assert found["train_step", "hia"].mode == "both"
    assert found["train_step", "hia"].environment["command"].startswith("python -m bench end-to-end")
    assert " x hia" in capsys.readouterr().out

    # another run of some of it keeps the rest
    assert command(*flags, "--op", "decode", "--provider", "hia") == 0
    assert len(read_records(tmp_path / "end_to_end.json")) == len(records)


def test_a_deadline_is_a_reason(tiny_run, tmp_path, monkeypatch):
    clock = iter(range(0, 100000, 50))
    monkeypatch.setattr(end_to_end.time, "monotonic", lambda: next(clock))
    flags = ["--device", "cpu", "--resolutions", "224", "--provider", "hia", "--deadline", "10", "--out", str(tmp_path)]
    assert command(*flags) == 0
    records = read_records(tmp_path / "end_to_end.json")
    assert {record.status for record in records} == {"unavailable"}
    assert {record.reason for record in records} == {"--deadline: 10 s were over before its turn"}


def test_a_failure_is_a_row(tiny_run, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no such luck\nmore")

    monkeypatch.setattr(end_to_end, "build", fail)
    flags = ["--device", "cpu", "--provider", "hia", "--op", "decode", "--batch", "1", "--out", str(tmp_path)]
    assert command(*flags) == 1
    assert {record.reason for record in read_records(tmp_path / "end_to_end.json")} == {"ValueError: no such luck"}


def repetitions(breaks: str = "", calls: int = 0):
    """Repetitions that take 1 ms; those of one provider run out of memory after so many calls."""
    seen = iter(range(1000))

    def repetition(self):
        if self.provider == breaks and next(seen) >= calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        return [1.0] * (self.setting.new_tokens if self.case.op == "decode" else 1)

    return repetition


TWO = [
    "--device",
    "cpu",
    "--resolutions",
    "224",
    "--batch",
    "1",
    "--images-per-prompt",
    "1",
    "--new-tokens",
    "2",
    "--repeats",
    "3",
    "--op",
    "decode",
    "train_step",
    "--provider",
    "hia",
    "plain",
]


@pytest.mark.parametrize("calls", [1, 2], ids=["first-round", "second-round"])
def test_a_failure_in_the_timed_rounds_is_one_row(calls, tiny_run, tmp_path, monkeypatch):
    """Its own later steps are tried again, the other provider keeps its turns, and no half-measured time is left."""
    monkeypatch.setattr(Subject, "repetition", repetitions("hia", calls))
    assert command(*TWO, "--out", tmp_path) == 0, "out of memory is a finding"
    found = {(record.op, record.provider): record for record in read_records(tmp_path / "end_to_end.json")}
    assert len(found) == 4
    for op in ("decode", "train_step"):
        assert (found[op, "hia"].status, found[op, "hia"].reason) == ("failed", "out of memory")
        assert found[op, "hia"].p50_ms is None
        assert found[op, "plain"].status == "ok"
    assert found["decode", "plain"].repeats == 3 * 2, "the other one had all its rounds"


def test_a_failure_in_the_peak_pass_is_one_row(tiny_run, tmp_path, monkeypatch, capsys):
    def peak(subject):
        if subject.provider == "hia" and subject.case.op == "train_step":
            raise RuntimeError("no memory left\nmore")
        return [1.0], 4096

    monkeypatch.setattr(Subject, "repetition", repetitions())
    monkeypatch.setattr(end_to_end, "process_peak_unavailable", lambda: None)
    monkeypatch.setattr(end_to_end, "repeat_with_peak", peak)
    assert command(*TWO, "--out", tmp_path) == 1
    found = {(record.op, record.provider): record for record in read_records(tmp_path / "end_to_end.json")}
    assert found["train_step", "hia"].reason == "RuntimeError: no memory left"
    others = [record for key, record in found.items() if key != ("train_step", "hia")]
    assert len(others) == 3
    for record in others:
        assert (record.status, record.peak_bytes) == ("ok", 4096)
        assert record.extra["total_bytes"] == record.extra["model_bytes"] + 4096
    assert "hia       failed: RuntimeError: no memory left" in capsys.readouterr().out


def test_a_model_that_cannot_be_left_as_it_was_is_built_anew(tiny_run, tmp_path, monkeypatch, capsys):
    built, close = [], Subject.close

    def build(provider, setting):
        built.append(provider)
        return run.build(provider, setting)

    def broken_close(self):
        close(self)
        raise RuntimeError("nothing folds again")

    monkeypatch.setattr(Subject, "repetition", repetitions())
    monkeypatch.setattr(end_to_end, "build", build)
    monkeypatch.setattr(Subject, "close", broken_close)
    assert command(*TWO, "--out", tmp_path) == 0
    assert sorted(built) == ["hia", "hia", "plain", "plain"]
    assert "hia is built anew: RuntimeError: nothing folds again" in capsys.readouterr().err


def test_a_training_step_that_cannot_start_leaves_the_model_as_it_was(setting, monkeypatch):
    model = run.build("plain", setting)
    monkeypatch.setattr(run.torch.optim, "AdamW", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Subject("plain", model, setting, Case("train_step", 224, 1, 1))
    assert not model.training
    assert not any(value.requires_grad for value in model.parameters())


def test_ctrl_c_before_anything_is_measured(tiny_run, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(end_to_end.roofline, "measure", interrupted)
    assert command(*TWO, "--out", tmp_path) == 130
    assert "interrupted before anything was measured; nothing is written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_what_was_measured(tiny_run, tmp_path, monkeypatch, capsys):
    plain = end_to_end.Run._measure

    def measure(self, case, providers):
        if case.op == "train_step":
            raise KeyboardInterrupt
        return plain(self, case, providers)

    monkeypatch.setattr(Subject, "repetition", repetitions())
    monkeypatch.setattr(end_to_end.Run, "_measure", measure)
    assert command(*TWO, "--out", tmp_path) == 130
    assert {record.op for record in read_records(tmp_path / "end_to_end.json")} == {"decode"}
    assert "interrupted; what was measured is written" in capsys.readouterr().out


def test_list_says_why_not(capsys):
    assert command("--device", "cpu", "--list") == 0
    said = capsys.readouterr().out
    assert "448px-2img-b4      released  the released maths takes one prompt at a time, got a batch of 4" in said


def test_peaks_count_what_a_repetition_adds(setting, monkeypatch):
    class Meter:
        def measure(self, call):
            return Memory(64, 0, call())

    class Fake:
        def repetition(self):
            return [1.0]

    Fake.setting = setting
    monkeypatch.setattr(run, "user_meter", lambda _device: Meter())
    assert run.repeat_with_peak(Fake()) == ([1.0], 64)
    monkeypatch.setattr(run, "user_meter", lambda _device: None)
    assert run.repeat_with_peak(Fake()) == ([1.0], None)


def test_a_row_stands_for_its_own_setting_alone(tiny_run, setting, tmp_path, monkeypatch):
    """Measure again what was measured with another attention, more repetitions or another text."""
    facts = {"device": "made up", "commit": "0123456789", "dirty": False, "versions": {}}
    monkeypatch.setattr(end_to_end.environment, "describe", lambda _device: facts)
    seen, path = [], tmp_path / "end_to_end.json"
    with monkeypatch.context() as patch:
        patch.setattr(end_to_end, "run", lambda options, **places: seen.append(options) or 0)
        command("--device", "cpu", "--provider", "hia", "--resolutions", "448")
    (options,) = seen

    def resumed(setting=setting, **changed):
        running = end_to_end.Run(dataclasses.replace(options, **changed), setting, [path], resume=True)
        return running._settled

    first = end_to_end.Run(options, setting, [path])
    first.records = [first.rows.unavailable(planning.plan(options)[0][0], "hia", "not here")]
    first.write()
    assert resumed() == {first.records[0].key}
    assert not resumed(dataclasses.replace(setting, attention="eager"))
    for changed in ({"repeats": 99}, {"budget": 0.5}, {"text_tokens": 9}, {"new_tokens": 3}):
        assert not resumed(**changed), changed
