"""HiAProcessor: placeholders, maps, instruction index, labels; real radiographs end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hia
from tests.hia.conftest import NONE, ONE, TWO, random_images
from tests.hia.hosts import IMAGE_SIZE, TOKENS_PER_IMAGE, VOCABULARY, stir, tiny_config, tiny_llava, tiny_processor

A, B, C = random_images()


@pytest.mark.parametrize("side", ["left", "right"])
def test_maps_follow_the_padding(processor, side):
    batch = processor([TWO, NONE, ONE], [[A, B], [], [C]], padding_side=side)
    image_token = VOCABULARY["<image>"]
    assert torch.equal(batch.image_map >= 0, batch.input_ids == image_token)
    assert [(batch.image_map == i).sum() for i in range(3)] == [TOKENS_PER_IMAGE] * 3
    assert [row.unique().tolist() for row in batch.image_map] == [[-1, 0, 1], [-1], [-1, 2]]
    for row, position in enumerate(batch.instruction_index.tolist()):
        assert batch.attention_mask[row, position] == 1
        assert batch.input_ids[row, position] == VOCABULARY[":"]  # the last token of every prompt here
        assert not batch.attention_mask[row, position + 1 :].any()
    assert [tuple(p.shape) for p in batch.high_res_pixels] == [(70, 50, 1), (33, 90, 1), (41, 40, 3)]
    assert [p.dtype for p in batch.high_res_pixels] == [torch.uint16, torch.uint8, torch.uint8]
    assert batch.pixel_values.shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_flat_list_and_single_image_are_understood(processor):
    nested = processor([TWO, ONE], [[A, B], [C]])
    flat = processor([TWO, ONE], [A, B, C])
    assert torch.equal(nested.image_map, flat.image_map)
    assert torch.equal(processor(ONE, A).image_map, processor([ONE], [[A]]).image_map)


def test_text_only(processor):
    batch = processor([NONE, NONE])
    assert set(batch) == {"input_ids", "attention_mask", "instruction_index"}


def test_base_inputs_are_those_of_the_hosts_processor(processor):
    image = np.asarray(C)
    mine, theirs = processor(ONE, image), tiny_processor()(text=ONE, images=image, return_tensors="pt")
    assert torch.equal(mine.input_ids, theirs["input_ids"])
    torch.testing.assert_close(mine.pixel_values, theirs["pixel_values"])


def test_max_length_cuts_the_answer_only(processor):
    prompt = processor(ONE, A).input_ids.shape[1]
    batch = processor(ONE, A, answers="no new lesion.", max_length=prompt + 2)
    assert batch.input_ids.shape[1] == prompt + 2
    with pytest.raises(ValueError, match=f"text 0 must fit max_length {prompt - 1}, got {prompt} tokens"):
        processor(ONE, A, max_length=prompt - 1)


def test_windows_override(processor):
    batch = processor(TWO, [A, B], windows=[(10, 500), None])
    assert batch.windows.tolist() == [[10, 500], [0, 255]]


def test_without_high_resolution_the_encoder_gets_the_hosts_size(base):
    processor = hia.HiAProcessor(tiny_processor(), high_resolution=False)
    batch = processor(TWO, [A, B])
    assert [tuple(p.shape) for p in batch.high_res_pixels] == [(IMAGE_SIZE, IMAGE_SIZE, 1)] * 2
    assert [p.dtype for p in batch.high_res_pixels] == [torch.uint16, torch.uint8]


def test_moving_leaves_the_maps_on_the_cpu(processor):
    moved = processor(TWO, [A, B]).to("meta", torch.float16)
    assert moved.input_ids.is_meta
    assert moved.high_res_pixels[0].is_meta
    assert moved.high_res_pixels[0].dtype == torch.uint16
    assert moved.pixel_values.dtype == torch.float16
    assert moved.image_map.device.type == moved.instruction_index.device.type == "cpu"


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        pytest.param(lambda p: p(TWO, A), ValueError, "text 0 has 2 <image>, got 1 images", id="too-few"),
        pytest.param(lambda p: p(NONE, A), ValueError, "text 0 has 0 <image>, got 1 images", id="too-many"),
        pytest.param(
            lambda p: p([TWO, ONE], [[A, B], []]), ValueError, "text 1 has 1 <image>, got 0 images", id="second"
        ),
        pytest.param(lambda p: p([TWO, ONE], [A, B]), ValueError, "the texts have 3 <image>, got 2 images", id="flat"),
        pytest.param(
            lambda p: p([TWO, ONE], [[A, B]]), ValueError, r"one list per text \(2\), got 1 lists", id="lists"
        ),
        pytest.param(
            lambda p: p(ONE, np.zeros((0, 4), np.uint8)), ValueError, r"images\[0\] must have shape", id="zero"
        ),
        pytest.param(
            lambda p: p(TWO, [A, np.full((20, 20), np.nan)]), ValueError, r"images\[1\] must be finite", id="nan"
        ),
        pytest.param(
            lambda p: p(ONE, np.full((20, 20), -1.0)), ValueError, r"images\[0\] must not be negative", id="negative"
        ),
        pytest.param(
            lambda p: p(ONE, np.zeros((20, 20), int)), TypeError, r"images\[0\] must be uint8, .* got int64", id="dtype"
        ),
        pytest.param(
            lambda p: p([3]), TypeError, r"text must be a string or a list of strings, got \[int\]", id="text"
        ),
        pytest.param(lambda p: p([]), TypeError, "text must be a string or a list of strings", id="no-text"),
        pytest.param(
            lambda p: p(ONE, A, answers=["a", "b"]),
            ValueError,
            "answers must be one per text, got 2 for 1",
            id="answers",
        ),
        pytest.param(
            lambda p: p(ONE, A, answers="<image>"), ValueError, "answers must not hold <image>", id="image-answer"
        ),
        pytest.param(
            lambda p: p(ONE, A, windows=[None, None]),
            ValueError,
            r"windows must be one per image \(1\), got 2",
            id="windows",
        ),
        pytest.param(
            lambda p: p(ONE, A, padding_side="top"),
            ValueError,
            "padding_side must be 'left' or 'right', got 'top'",
            id="side",
        ),
    ],
)
def test_bad_input(processor, call, kind, message):
    with pytest.raises(kind, match=message):
        call(processor)


def test_image_smaller_than_the_stem(processor, model):
    batch = processor(ONE, np.zeros((10, 60), np.uint8))
    with pytest.raises(
        ValueError, match=r"high_res_pixels\[0\] must be at least 11 x 11 pixels, the stem's reach, got 10 x 60"
    ):
        model(**batch)


def test_two_real_studies_of_a_patient(radiographs):
    """Compare day 2 and day 21 of one patient, at full size; details that 28 x 28 lost change the answer's logits."""
    studies = [path for path in radiographs if "p221" in path.name]
    assert len(studies) == 2
    base = tiny_llava()
    model = stir(hia.get_hia_model(base, tiny_config(base)))
    processor = hia.HiAProcessor(tiny_processor())
    batch = processor(TWO, studies)
    assert [tuple(p.shape) for p in batch.high_res_pixels] == [(2000, 2000, 1)] * 2
    erased = hia.HiABatch(batch)
    erased["high_res_pixels"] = [p.clone() for p in batch.high_res_pixels]
    erased["high_res_pixels"][1][900:960, 700:760] = 0  # 0.1 % of the second study
    with torch.no_grad():
        before, after = model(**batch).logits, model(**erased).logits
    assert not torch.equal(before[:, -1], after[:, -1])
    model.generate(**batch, max_new_tokens=3, do_sample=False)


def test_real_dicom_and_jpeg_in_one_prompt(data_dir, radiographs):
    base = tiny_llava()
    model = hia.get_hia_model(base, tiny_config(base, encoder="strided"))
    batch = hia.HiAProcessor(tiny_processor())(TWO, [data_dir / "dicom" / "RG3_deflated.dcm", radiographs[0]])
    assert [p.dtype for p in batch.high_res_pixels] == [torch.uint16, torch.uint8]
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()


def test_real_tokenizers(data_dir):
    """Try both LLaMA-2 vocabularies, with <image> added: one placeholder becomes as many tokens as the host wants."""
    from transformers import LlamaTokenizer, LlavaProcessor

    for name in ("llama-2", "chinese-llama-2"):
        tokenizer = LlamaTokenizer.from_pretrained(data_dir / "tokenizer" / name)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        host = LlavaProcessor(
            tiny_processor().image_processor,
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        processor = hia.HiAProcessor(host)
        batch = processor(
            ["比较这两张胸片：<image><image>\n有什么变化？", "<image>\n描述"], [[A, B], [C]], answers=["没有。", "好"]
        )
        assert [int((batch.image_map == i).sum()) for i in range(3)] == [TOKENS_PER_IMAGE] * 3
        assert (batch.labels >= 0).sum(1).min() > 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_lies_on_the_side_asked_for(processor, side):
    batch, alone = processor([TWO, NONE], [[A, B], []], padding_side=side), processor(NONE).input_ids[0]
    padding = batch.input_ids.shape[1] - alone.shape[0]
    assert padding > 0
    real = slice(padding, None) if side == "left" else slice(0, alone.shape[0])
    assert torch.equal(batch.input_ids[1, real], alone)
    assert batch.attention_mask[1, real].all() and batch.attention_mask[1].sum() == alone.shape[0]
