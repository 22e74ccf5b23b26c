"""``python -m hia.phantom``: the sheet, the files, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hia.phantom.__main__
import hia.phantom.records
from hia import load_image
from hia.phantom import PhantomConfig, PhantomDataset
from hia.phantom.__main__ import main
from hia.phantom.records import write_records
from hia.phantom.sheet import draw_sheet, find_cjk_font

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    command = [sys.executable, "-m", "hia.phantom", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_draws_the_sheet_in_the_working_directory(tmp_path):
    done = run("--sheet", "--size", "64x80", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["phantom-sheet.png"]
    with Image.open(tmp_path / "phantom-sheet.png") as sheet:
        assert sheet.mode == "RGB" and sheet.width > 1500 and sheet.height > 2000
    assert done.stdout.startswith("phantom-sheet.png")


def test_import_hia_leaves_the_phantom_alone():
    code = "import sys, hia; print([name for name in sys.modules if name.startswith('hia.phantom')])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_sheet_follows_from_its_seed():
    config = PhantomConfig(size=48)
    first, again, other = (np.asarray(draw_sheet(seed, config)) for seed in (1, 1, (2,)))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_long_writing_says_how_far_it_is(monkeypatch, capsys):
    clock = iter([0.0, 9.0, 11.0, 11.0, 12.0, 22.0, 22.0])
    monkeypatch.setattr(hia.phantom.__main__.time, "monotonic", lambda: next(clock))
    progress = hia.phantom.__main__._Progress(50)
    for done in (1, 2, 3, 4):
        progress(done)
    assert capsys.readouterr().out == "2 of 50 records\n4 of 50 records\n"


def test_a_font_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="font must be a TrueType or OpenType file"):
        find_cjk_font(tmp_path / "none.ttf")


@pytest.mark.parametrize(("bits", "dtype"), [(8, np.uint8), (12, np.uint16), (16, np.uint16)])
def test_written_files_hold_the_pixels_and_the_questions(tmp_path, capsys, bits, dtype):
    folder = tmp_path / "studies"
    arguments = f"--write {folder} --count 9 --size 40x50 --bits {bits} --seed 6 --language zh --radius 2 4".split()
    assert main(arguments) == 0
    assert "9 records" in capsys.readouterr().out
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    dataset = PhantomDataset(9, 6, PhantomConfig((40, 50), bits, (2.0, 4.0)), language="zh", wording=None)
    assert len(lines) == 9
    for line, sample in zip(lines, (dataset[index] for index in range(9))):
        record = json.loads(line)
        assert list(record) == ["id", "task", "images", "conversations"]
        human, gpt = record["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"] == "<image>" * len(sample.images) + "\n" + sample.question.text
        assert gpt["value"] == sample.question.answer and record["task"] == sample.question.task
        assert len(record["images"]) == len(sample.images)
        for name, radiograph in zip(record["images"], sample.images):
            pixels = load_image(folder / name).pixels.numpy()
            assert pixels.dtype == dtype and np.array_equal(pixels, radiograph.pixels.numpy())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["studies"]


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_is_filled(tmp_path, capsys):
    folder = tmp_path / "studies"
    folder.mkdir()
    assert main(["--write", str(folder), "--count", "2", "--size", "16"]) == 0
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(["--write", str(folder), "--count", "3", "--size", "16"])
    assert stopped.value.code == 2 and "folder must be new or empty" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_a_link_to_an_empty_folder_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write_records(tmp_path / "link", PhantomDataset(1, config=PhantomConfig(16)))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "records.jsonl").is_file()


def test_what_fails_halfway_leaves_nothing(tmp_path, monkeypatch):
    def fail_late(path: Path, _radiograph: object) -> None:
        if "000003" in path.name:
            raise OSError("disk full")
        path.write_bytes(b"")

    monkeypatch.setattr(hia.phantom.records, "save_png", fail_late)
    with pytest.raises(OSError, match="disk full"):
        write_records(tmp_path / "studies", PhantomDataset(9, config=PhantomConfig(16)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do: give --sheet, --write DIR or --host DIR"),
        (["--sheet", "--size", "big"], "must be N or HEIGHTxWIDTH in pixels, got 'big'"),
        (["--sheet", "--bits", "4"], "bits must be 8 to 16, got 4"),
        (["--sheet", "--radius", "5", "2"], "radius must be (least, most) within 0.5 and 24, got (5.0, 2.0)"),
        (["--sheet", "sheet.jpg"], "--sheet must name a .png file, got sheet.jpg"),
        (["--write", "nowhere/at/all", "--count", "1"], "folder must have a parent that exists"),
        (["--write", "studies", "--count", "-1"], "count must not be negative, got -1"),
        (["--write", "studies", "--tasks", "report"], "invalid choice: 'report'"),
        (["--write", "studies", "--sheet", "sheet.jpg"], "--sheet must name a .png file, got sheet.jpg"),
        (
            ["--write", "studies", "--sheet", "no/sheet.png"],
            "--sheet must have a parent that exists, got no/sheet.png",
        ),
        (["--write", "studies", "--sheet", "--font", "none.ttf"], "font must be a TrueType or OpenType file"),
        (["--write", "."], "folder must not be the working directory, which would be replaced"),
        (["--write", "studies", "--host", "nowhere/at/all"], "--host must have a parent that exists"),
        (["--write", "studies", "--host", "."], "--host must name a new folder, got ., which exists"),
        (["--write", "studies", "--host", "./studies"], "--host must name another folder than --write"),
    ],
)
def test_wrong_arguments_exit_with_2_and_say_why(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_tiny_host_is_saved_with_its_processor(tmp_path, monkeypatch, capsys):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    import hia.phantom.host as host

    small = host.TinyHostRecipe(layers=2, hidden_size=32, samples=5, tower_steps=1, steps=1, seed=4)
    monkeypatch.setattr(host, "TinyHostRecipe", lambda seed: small if seed == 4 else None)
    assert main(["--host", str(tmp_path / "tiny"), "--seed", "4"]) == 0
    assert "step 1 of 1" in capsys.readouterr().out
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "tiny")
    assert loaded.config.text_config.num_hidden_layers == 2
    processor = AutoProcessor.from_pretrained(tmp_path / "tiny")
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == loaded.config.image_token_id
    with pytest.raises(SystemExit):
        main(["--host", str(tmp_path / "tiny")])
    assert "--host must name a new folder, got" in capsys.readouterr().err
