"""The tiny host and batches of phantoms: what they are made of. That it learns is the ablation's business."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import hia
from hia.phantom import TASKS, PhantomConfig, PhantomDataset, vocabulary
from hia.phantom.batches import PhantomBatches, prompt_of
from hia.phantom.host import (
    TinyHostRecipe,
    build_tiny_host,
    hia_processor,
    save_tiny_host,
    save_whole,
    tiny_host,
    tiny_processor,
    tiny_tokenizer,
    train_tiny_host,
)

MINUTE = TinyHostRecipe(layers=3, hidden_size=32, samples=10, tower_steps=2, steps=2)


@pytest.fixture(scope="module")
def host():
    return build_tiny_host(MINUTE)


@pytest.fixture(scope="module")
def batches(host):
    dataset = PhantomDataset(10, 3, PhantomConfig(size=64, bits=8), (*TASKS, "bone"))
    return PhantomBatches(dataset, hia_processor(host))


def test_the_tokenizer_knows_every_word():
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) < 128
    for word in [*vocabulary(), "USER", "ASSISTANT", "<image>"]:
        (number,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert number != tokenizer.unk_token_id and tokenizer.decode([number]) == word


def test_a_batch_is_the_processors(host, batches):
    dataset = PhantomDataset(10, 3, PhantomConfig(size=64, bits=8), (*TASKS, "bone"))
    samples = [dataset[number] for number in (3, 0, 1)]
    expected = hia_processor(host)(
        [prompt_of(sample.question, len(sample.images)) for sample in samples],
        [sample.images for sample in samples],
        [sample.question.answer for sample in samples],
        padding_side="right",
    )
    found = batches.batch([3, 0, 1])
    assert set(expected) - set(found) == {"image_map"}
    for name, value in found.items():
        if name == "high_res_pixels":
            assert all(torch.equal(a, b) for a, b in zip(value, expected[name], strict=True))
        else:
            assert torch.equal(value, expected[name]), name
    assert set(batches.batch([1], high_res=False)) == {"input_ids", "attention_mask", "labels", "pixel_values"}


def test_every_sample_comes_once_a_round(batches):
    order = batches.shuffled(4, seed=0)
    seen = [number for _ in range(5) for number in next(order)]
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_a_score_counts_whole_answers(batches):
    """Score a model that knows the labels at 1; one wrong token of an answer costs the answer."""

    class Told(torch.nn.Module):
        wrong = False

        def forward(self, labels, **_):
            logits = torch.zeros(*labels.shape, 200)
            answer = labels.clamp_min(0)[:, 1:]
            logits[:, :-1].scatter_(2, answer[..., None], 1.0)
            if self.wrong:
                last = (labels != -100).int().cumsum(1).argmax(1) - 1  # predicts </s>
                logits[torch.arange(len(labels)), last] = torch.eye(200)[199]
            return type("Output", (), {"logits": logits})

    model = Told()
    assert batches.score(model, size=3) == dict.fromkeys((*TASKS, "bone"), 1.0)
    model.wrong = True
    assert batches.score(model, samples=[0, 1]) == {"description": 0.0, "disease": 0.0}


def test_greedy_decoding_agrees_with_the_score(host, batches):
    """Compare the score with its definition on what an untrained host decodes."""
    model = hia.get_hia_model(build_tiny_host(MINUTE), hia.HiAConfig.paper(host, num_queries=4, encoder="strided"))
    for sample in range(5):
        labels = batches.batch([sample])["labels"]
        answer = labels[labels != -100]
        asked = batches.batch([sample])
        stop = int(asked.instruction_index[0]) + 1
        inputs = {**asked, "input_ids": asked.input_ids[:, :stop], "attention_mask": asked.attention_mask[:, :stop]}
        inputs.pop("labels")
        decoded = model.generate(**inputs, max_new_tokens=len(answer), do_sample=False)[0, stop:]
        exact = len(decoded) == len(answer) and torch.equal(decoded, answer)
        assert batches.score(model, samples=[sample])[batches.questions[sample].task] == float(exact)


def test_one_recipe_makes_one_host():
    state = torch.get_rng_state()
    first, again = train_tiny_host(MINUTE), train_tiny_host(MINUTE)
    assert torch.equal(torch.get_rng_state(), state) and not first.training
    other = train_tiny_host(dataclasses.replace(MINUTE, seed=1))
    for (name, a), b, c in zip(first.state_dict().items(), again.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b), name
        assert a.dim() < 2 or not torch.equal(a, c), name
    fresh = build_tiny_host(MINUTE).state_dict()
    moved = [name for name, value in first.state_dict().items() if not torch.equal(value, fresh[name])]
    assert any("vision_tower" in name for name in moved) and any("language_model" in name for name in moved)


def test_the_cache_keeps_it(tmp_path, monkeypatch):
    told = []
    trained = tiny_host(MINUTE, tmp_path, told.append)
    assert told and [path.name for path in tmp_path.iterdir()] == [f"tiny-host-{MINUTE.fingerprint()}"]
    told.clear()
    loaded = tiny_host(MINUTE, tmp_path, told.append)
    assert not told and not loaded.training
    for a, b in zip(trained.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert dataclasses.replace(MINUTE, steps=3).fingerprint() != MINUTE.fingerprint()
    monkeypatch.setenv("HIA_CACHE", str(tmp_path))
    assert not told and tiny_host(MINUTE, progress=told.append) is not None and not told
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="^hia.phantom: cache must be a directory, got the file"):
        tiny_host(MINUTE, tmp_path / "file")


def _without_a_tensor(place):
    tensors = load_file(place / "model.safetensors")
    tensors.popitem()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "no config": lambda place: (place / "config.json").unlink(),
    "half a config": lambda place: (place / "config.json").write_text("{"),
    "no weights": lambda place: (place / "model.safetensors").unlink(),
    "half the weights": lambda place: os.truncate(place / "model.safetensors", 1000),
    "a tensor is missing": _without_a_tensor,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_not_used(host, tmp_path, damage):
    place = tmp_path / f"tiny-host-{MINUTE.fingerprint()}"
    save_tiny_host(host, MINUTE, place)
    DAMAGES[damage](place)
    with pytest.raises(ValueError, match=f"^hia.phantom: cache must hold whole hosts, got {place}, .*; delete it"):
        tiny_host(MINUTE, tmp_path)
    assert place.is_dir()  # it may be looked into


def test_a_cache_that_cannot_be_written_is_known_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("hia.phantom.host.train_tiny_host", lambda *_: pytest.fail("trained first"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        tiny_host(MINUTE, tmp_path / "file" / "cache")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="cache must be a directory that can be written"):
        tiny_host(MINUTE, tmp_path / "cache")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    def fails(folder):
        (folder / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_whole(tmp_path / "place", fails)
    assert not list(tmp_path.iterdir())
    save_whole(tmp_path / "place", lambda folder: (folder / "a").write_text("1"))
    save_whole(tmp_path / "place", lambda folder: (folder / "a").write_text("2"))  # another process was faster
    assert (tmp_path / "place" / "a").read_text() == "1"


def test_errors_name_the_argument():
    for name, value in (("layers", 0), ("steps", -1), ("samples", 1.5), ("hidden_size", 20)):
        with pytest.raises(ValueError, match=f"^hia.phantom: {name} must be a .*, got {value}$"):
            TinyHostRecipe(**{name: value})


def test_its_processor_makes_one_token_a_patch(host):
    processor = tiny_processor()
    image = PhantomDataset(1, 0)[0].images[0]
    inputs = hia.HiAProcessor(processor)("USER: <image> is there ? ASSISTANT:", image)
    assert int((inputs.image_map >= 0).sum()) == 16 and inputs.pixel_values.shape == (1, 3, 40, 40)
