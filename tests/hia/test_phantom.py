"""Synthetic studies: what follows from the seed, what is in the pixels, what is asked, what is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench.ablation.detail import matched_filter
from hia.phantom import (
    BONES,
    CHANGES,
    EXTRA_TASKS,
    LANGUAGES,
    MARGIN,
    QUADRANTS,
    TASKS,
    PhantomConfig,
    PhantomDataset,
    Study,
    answers,
    ask,
    draw_study,
    tokens,
    vocabulary,
    wordings,
)

ROOT = Path(__file__).resolve().parent.parent.parent
ALL_TASKS = TASKS + EXTRA_TASKS


def digest(study: Study) -> str:
    found = hashlib.sha256(repr([visit.lesions for visit in study.visits]).encode())
    for visit in study.visits:
        found.update(visit.radiograph.pixels.numpy().tobytes())
    return found.hexdigest()


def grey(study: Study, size: int | None = None, visit: int = 0) -> torch.Tensor:
    radiograph = study.visits[visit].radiograph
    return (radiograph if size is None else radiograph.resized(size, size)).windowed()[..., 0]


def test_a_study_follows_from_its_seed_in_every_process():
    code = (
        "from tests.hia.test_phantom import digest; from hia.phantom import draw_study; "
        "print(digest(draw_study((7, 1), visits=2)))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == digest(draw_study((7, 1), visits=2)), done.stderr


def test_seeds_that_look_alike_give_different_studies():
    seeds = [0, 1, -1, (1, 0), (0, 1), (0, 0), 2**32, 2**64 + 1, (1, 2), 12]
    assert len({digest(draw_study(seed)) for seed in seeds}) == len(seeds)
    assert digest(draw_study(3)) == digest(draw_study((3,)))


def test_a_lesion_changes_only_its_own_pixels():
    config = PhantomConfig(radius=(6, 6), noise=0.02)
    without, with_ = (draw_study(5, config, lesion=lesion) for lesion in (False, True))
    changed = without.visits[0].radiograph.pixels.int() != with_.visits[0].radiograph.pixels.int()
    mask = with_.visits[0].mask()
    assert not without.visits[0].mask().any() and changed.any()
    # a pixel that the rim only touches may have its centre outside the mask
    near = torch.nn.functional.max_pool2d(mask.float()[None, None], 3, 1, 1)[0, 0].bool()
    assert not (changed[..., 0] & ~near).any()


@pytest.mark.parametrize("bits", [8, 9, 12, 16])
def test_pixels_hold_the_bits_asked_for(bits):
    radiograph = draw_study(1, PhantomConfig(bits=bits)).visits[0].radiograph
    assert radiograph.pixels.dtype == (torch.uint8 if bits == 8 else torch.uint16)
    assert radiograph.pixels.shape == (192, 192, 1)
    assert radiograph.window == (0, 2**bits - 1)
    levels = radiograph.pixels.int()
    assert levels.min() >= 0 and 2 ** (bits - 1) < levels.max() < 2**bits, "half of the range must be used"


@pytest.mark.parametrize("size", [16, 42, (191, 257), (400, 90), 2048], ids=str)
def test_any_size_shows_a_lesion_where_its_place_is(size):
    config = PhantomConfig(size=size)
    study = draw_study(4, config, lesion=True, quadrant="lower right", bone="femur")
    visit = study.visits[0]
    height, width = config.shape
    lesion = visit.lesions[0]
    assert visit.radiograph.pixels.shape == (height, width, 1)
    assert visit.mask().shape == (height, width) and visit.mask()[round(lesion.row), round(lesion.column)]
    assert 1.5 <= lesion.radius / config.scale <= 3.25
    assert study.quadrant == "lower right"


def test_resolutions_show_the_same_anatomy():
    small, large = (draw_study(2, PhantomConfig(size=size, noise=0), lesion=True) for size in (192, 768))
    assert (grey(small, 96) - grey(large, 96)).abs().mean() < 0.005
    (a,), (b,) = small.visits[0].lesions, large.visits[0].lesions
    assert b.radius == pytest.approx(4 * a.radius)
    assert b.row + 0.5 == pytest.approx(4 * (a.row + 0.5)) and b.column + 0.5 == pytest.approx(4 * (a.column + 0.5))


@pytest.mark.parametrize("radius", [(1.5, 3.25), (10, 20), (24, 24)], ids=str)
@pytest.mark.parametrize("quadrant", QUADRANTS)
def test_a_lesion_lies_in_its_quadrant_and_off_the_midlines(radius, quadrant):
    for seed in range(40):
        study = draw_study(seed, PhantomConfig(radius=radius), visits=2, quadrant=quadrant, change=CHANGES[seed % 5])
        for visit in study.visits:
            for lesion in visit.lesions:
                down, across = lesion.row - 95.5, lesion.column - 95.5
                assert min(abs(down), abs(across)) >= max(MARGIN, lesion.radius) - 1e-6
                assert ("lower" in quadrant) == (down > 0) and ("right" in quadrant) == (across > 0)
                assert max(abs(down), abs(across)) + lesion.radius < 96
        assert study.quadrant == quadrant


def test_a_small_lesion_lies_within_the_body():
    for seed in range(60):
        study = draw_study(seed, PhantomConfig(noise=0), lesion=True)
        without = grey(draw_study(seed, PhantomConfig(noise=0), lesion=False))
        lesion = study.visits[0].lesions[0]
        assert without[round(lesion.row), round(lesion.column)] > 0.3, f"seed {seed}: no bone around the lesion"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("radius", [(1.5, 3.25), (10, 12)], ids=str)
def test_a_change_is_what_it_says(change, radius):
    for seed in range(20):
        study = draw_study(seed, PhantomConfig(radius=radius), visits=2, change=change)
        before, after = (sum(lesion.radius for lesion in visit.lesions) for visit in study.visits)
        assert study.change == change
        if change == "new":
            assert before == 0 < after
        elif change == "gone":
            assert before > 0 == after
        elif change == "unchanged":
            assert before == after > 0
        else:
            small, large = sorted((before, after))
            assert (after > before) == (change == "grown")
            assert 1.6 - 1e-6 <= large / small <= 2.2 + 1e-6 and small >= radius[0]
            assert large <= max(radius[1], small * 1.6) + 1e-6


def test_a_second_visit_is_another_exposure_of_the_same_bones():
    for seed in range(10):
        study = draw_study(seed, PhantomConfig(noise=0.02), visits=2, lesion=False)
        first, second = (grey(study, visit=visit) for visit in (0, 1))
        assert study.change == "unchanged" and study.quadrant is None
        assert not torch.equal(first, second)
        assert torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1] > 0.95
        same = draw_study(seed, PhantomConfig(), visits=2, change="unchanged")
        (a,), (b,) = (visit.lesions for visit in same.visits)
        assert 1 - 1e-6 <= ((a.row - b.row) ** 2 + (a.column - b.column) ** 2) ** 0.5 <= 2 + 1e-6


def test_a_lesion_sums_to_nothing_wherever_its_centre_falls():
    for radius in (1.5, 2.3, 3.25, 7, 12):
        for seed in range(10):
            config = PhantomConfig(bits=16, radius=(radius, radius), noise=0, contrast=0.2)
            with_, without = (grey(draw_study(seed, config, lesion=lesion, bone="femur")) for lesion in (True, False))
            difference = with_ - without
            assert difference.sum().abs() < 0.01 * difference.abs().sum() or radius > 5  # the large may leave the bone


def detectability(radius: float, size: int) -> float:
    return matched_filter(radius, size, studies=16, lesions=4)[0]


@pytest.mark.parametrize(("radius", "least", "most"), [(1.5, 12, 0.5), (2.4, 12, 1.5), (3.25, 12, 3)], ids=str)
def test_a_small_lesion_is_plain_in_the_image_and_lost_in_the_view(radius, least, most):
    assert detectability(radius, 192) > least
    assert detectability(radius, 42) < most


@pytest.mark.parametrize("radius", [10, 20])
def test_a_large_lesion_is_plain_in_both(radius):
    assert detectability(radius, 192) > 12
    assert detectability(radius, 42) > 9


def test_bones_look_different_in_the_small_view():
    means = {bone: torch.stack([grey(draw_study(seed, bone=bone), 42) for seed in range(8)]) for bone in BONES}
    right = 0
    for bone in BONES:
        for seed in range(20, 30):
            view = grey(draw_study(seed, bone=bone), 42)
            right += min(BONES, key=lambda other: float((means[other] - view).square().sum((1, 2)).min())) == bone
    assert right >= 39, f"the nearest of 8 examples names the bone of {right} of 40 views"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("task", ALL_TASKS)
def test_answers_are_balanced_and_true(task, language):
    choices = answers(task, language)
    tasks = (task, "disease")
    dataset = PhantomDataset(6 * len(choices), 3, PhantomConfig(size=24), tasks, language, wording=None)
    samples = [dataset[index] for index in range(0, len(dataset), 2)]
    assert set(Counter(sample.question.answer for sample in samples).values()) == {3}
    for sample in samples:
        question, study = sample.question, sample.study
        assert question.task == task and question.language == language
        assert question.choices == choices and question.answer in choices and question.text in wordings(task, language)
        assert len(sample.images) == len(study.visits) == (2 if task == "comparative" else 1)
        assert sample.images[0] is study.visits[0].radiograph
        if task in ("disease", "description") and language == "en":
            words = {"disease": ("yes.", "no."), "description": (" with ", " without ")}[task]
            assert (words[0] in question.answer) == bool(study.visits[0].lesions) != (words[1] in question.answer)
        if task in ("bone", "description") and language == "en":
            assert study.bone in question.answer
        if task in ("location", "description") and language == "en" and study.quadrant:
            assert study.quadrant in question.answer
        if task == "comparative" and language == "en":
            assert study.change is not None and question.answer == f"{study.change}."
    assert len({question.text for question in (sample.question for sample in samples)}) == len(wordings(task, language))


def test_chinese_says_what_english_says():
    for task in ALL_TASKS:
        pairs = set()
        for seed in range(60):
            study = draw_study(seed, PhantomConfig(size=16), visits=2 if task == "comparative" else 1)
            if task != "location" or study.visits[0].lesions:
                pairs.add(tuple(ask(study, task, language).answer for language in LANGUAGES))
        english, chinese = zip(*pairs)
        assert len(set(english)) == len(set(chinese)) == len(pairs)
        assert {answers(task).index(answer) for answer in english} == {
            answers(task, "zh").index(answer) for answer in chinese
        }
    assert ask(draw_study(0, lesion=True, quadrant="upper left"), "location", "zh").answer == "左上。"
    assert ask(draw_study(0, visits=2, change="shrunk"), "comparative", "zh").answer == "缩小。"


def test_the_vocabulary_is_small_and_holds_every_text():
    known = vocabulary()
    assert len(known) == len(set(known)) < 100
    for language in LANGUAGES:
        for task in ALL_TASKS:
            for text in (*wordings(task, language), *answers(task, language)):
                assert set(tokens(text)) <= set(known)
                assert len(tokens(text)) <= 12 and text == text.lower()


def test_an_item_follows_from_seed_and_index_alone():
    longer, shorter = PhantomDataset(20, (4, 2)), PhantomDataset(9, (4, 2))
    assert len(longer) == 20
    assert digest(longer[7].study) == digest(shorter[7].study) == digest(shorter[-2].study)
    assert [longer[index].question.task for index in range(4)] == list(TASKS)
    others = {digest(PhantomDataset(20, seed)[7].study) for seed in (0, 1, (4,), (4, 3), (2, 4))}
    assert len(others | {digest(longer[7].study)}) == 6
    with pytest.raises(IndexError, match="index must be below 20, got 20"):
        longer[20]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "size must be an integer or a pair of them, got 1.5", {"size": 1.5}),
        (ValueError, r"size must be \(height, width\) of at least 16 pixels, got \(192, 8\)", {"size": (192, 8)}),
        (ValueError, r"size must be .* got \(1, 2, 3\)", {"size": (1, 2, 3)}),
        (ValueError, "bits must be 8 to 16, got 7", {"bits": 7}),
        (TypeError, "bits must be an integer, got True", {"bits": True}),
        (TypeError, r"radius must be a pair of numbers \(least, most\), got 3", {"radius": 3}),
        (ValueError, r"radius must be \(least, most\) within 0.5 and 24, got \(3, 2\)", {"radius": (3, 2)}),
        (ValueError, "radius must be .* within 0.5 and 24", {"radius": (3, 25)}),
        (ValueError, "contrast must be 0 to 0.6, got 0.7", {"contrast": 0.7}),
        (TypeError, "noise must be a number, got '1'", {"noise": "1"}),
        (ValueError, "noise must be 0 to 0.25, got -1", {"noise": -1}),
        (ValueError, "noise must be 0 to 0.25, got nan", {"noise": float("nan")}),
    ],
)
def test_config_errors_name_the_argument(error, message, arguments):
    with pytest.raises(error, match=f"hia.phantom: {message}"):
        PhantomConfig(**arguments)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "seed must be an integer or a tuple of them, got '1'", {"seed": "1"}),
        (TypeError, r"seed must be .* got \(\)", {"seed": ()}),
        (TypeError, "config must be a PhantomConfig, got int", {"config": 3}),
        (ValueError, "visits must be 1 or 2, got 3", {"visits": 3}),
        (ValueError, "lesion must be None, True or False, got 'yes'", {"lesion": "yes"}),
        (ValueError, "change must be one of new, .*unchanged, got 'worse'", {"visits": 2, "change": "worse"}),
        (ValueError, "change must be None for one visit, got 'new'; visits=2 has one", {"change": "new"}),
        (ValueError, "change must be unchanged without a lesion", {"visits": 2, "lesion": False, "change": "new"}),
        (ValueError, "quadrant must be one of upper left, .*, got 'top'", {"quadrant": "top"}),
        (ValueError, "quadrant must be None without a lesion", {"lesion": False, "quadrant": "upper left"}),
        (ValueError, "bone must be one of femur, .*, got 'skull'", {"bone": "skull"}),
    ],
)
def test_study_errors_name_the_argument(error, message, arguments):
    with pytest.raises(error, match=f"hia.phantom: {message}"):
        draw_study(**({"seed": 0} | arguments))


def test_question_errors_name_the_argument():
    study = draw_study(0, lesion=False)
    with pytest.raises(ValueError, match="task must be one of description, .*, got 'report'"):
        ask(study, "report")
    with pytest.raises(ValueError, match="language must be one of en, zh, got 'de'"):
        ask(study, "disease", "de")
    with pytest.raises(ValueError, match="study must have a lesion in its last visit for the task location"):
        ask(study, "location")
    with pytest.raises(ValueError, match="study must have two visits for the task comparative, got 1"):
        ask(study, "comparative")


def test_dataset_errors_name_the_argument():
    with pytest.raises(TypeError, match="count must be an integer, got 2.0"):
        PhantomDataset(2.0)
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        PhantomDataset(-1)
    with pytest.raises(ValueError, match="tasks must be a sequence of at least one task, got 'disease'"):
        PhantomDataset(1, tasks="disease")
    with pytest.raises(ValueError, match="tasks must be one of"):
        PhantomDataset(1, tasks=("disease", "report"))
    with pytest.raises(ValueError, match="language must be one of"):
        PhantomDataset(1, language="fr")
    with pytest.raises(TypeError, match="seed must be"):
        PhantomDataset(1, seed=1.0)
    with pytest.raises(TypeError, match="config must be"):
        PhantomDataset(1, config=(192, 192))
    with pytest.raises(TypeError, match="wording must be an integer or None, got '0'"):
        PhantomDataset(1, wording="0")
