"""A lesion in a small view: the small CNN learns what it is shown, and is scored on other phantoms."""

from __future__ import annotations

import torch

from bench import __main__ as bench
from bench.ablation import detail
from bench.records import files


def test_the_classifier_takes_any_side():
    model = detail.classifier()
    assert all(model(torch.rand(3, 1, px, px)).shape == (3,) for px in (42, 192))


def test_large_lesions_are_learnt_in_the_view():
    """Train as the record's last row in a sixth of the steps: no other row fails by the network or its training."""
    state = torch.get_rng_state()
    (right,) = detail.train_classifier(detail.VIEW, ((detail.LARGE, 50),), test=64)
    assert right > 0.85
    assert torch.equal(torch.get_rng_state(), state)


def test_half_of_the_phantoms_hold_a_lesion_of_the_radius():
    images, present = detail._draw(20, (0, 1), (4.0, 4.0), 192)
    assert images.shape == (20, 1, 192, 192) and images.min() >= 0 and images.max() <= 1
    assert present.sum() == 10


def test_the_command_prints_and_records_both_tables(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    monkeypatch.setattr(detail, "RADII", (2.5,))
    monkeypatch.setattr(detail, "TRAININGS", (("large lesions", 42, ((detail.LARGE, 2), (detail.SMALL, 1))),))
    monkeypatch.setattr(detail, "matched_filter", lambda radius, px, studies, lesions: (px / 10, radius / px))
    monkeypatch.setattr(detail, "train_classifier", lambda px, stages: [0.5] * len(stages))
    assert bench.main(["ablation-detail", "--record"]) == 0
    printed = capsys.readouterr().out
    assert "radius 2.5   largest difference at 192 / 42 px 0.013 / 0.06, matched filter 19 / 4.2" in printed
    assert (
        "CNN at 42 px, large lesions (radii 10 to 20, 2 steps, radii 1.5 to 3.25, 1 steps): right 0.500, 0.500"
        in printed
    )
    (place,) = tmp_path.rglob("phantom_detail.json")
    record = files.read_json(place)
    assert record["matched_filter"] == [{"radius": 2.5, "192": [19.2, 2.5 / 192], "42": [4.2, 2.5 / 42]}]
    assert record["environment"]["command"].startswith("python -m bench ablation-detail")


def test_help_says_what_it_measures(capsys):
    assert bench.main(["ablation-detail", "--help"]) == 0
    assert "matched filter" in capsys.readouterr().out
