"""Faults in how the adapter starts, trains and is judged: an adapter that quietly learns less, or seems to learn."""

from __future__ import annotations

from .mutant import Mutant

HIA = "python/hia"
TESTS = "tests/hia"

START = (
    Mutant(
        name="columns-added-to-rows",
        kind="wrong index",
        file=f"{HIA}/position.py",
        old="features[..., half:] += columns",
        new="features[..., :half] += columns",
        tests=(f"{TESTS}/test_position.py::test_rows_and_columns_have_half_the_channels_each",),
        why="a place and its mirror along the diagonal are one",
    ),
    Mutant(
        name="positions-from-the-corner",
        kind="off by one at an edge",
        file=f"{HIA}/position.py",
        old="dtype=exact) + 0.5) / length",
        new="dtype=exact) + 0.0) / length",
        tests=(f"{TESTS}/test_position.py::test_one_place_has_one_code_in_every_resolution",),
        why="a lesion moves when the image is taken at another resolution",
    ),
    Mutant(
        name="no-positions-in-training",
        kind="lost part of a sum",
        file=f"{HIA}/position.py",
        old="return torch.cat([features[..., :half] + rows, features[..., half:] + columns], dim=-1)",
        new="return features",
        tests=(f"{TESTS}/test_position.py::test_the_encoder_adds_them_last",),
        why="an adapter is trained without the positions that it is asked with",
    ),
    Mutant(
        name="old-adapters-get-positions",
        kind="silent fallback",
        file=f"{HIA}/config.py",
        old='"position": "none", "init": "pytorch", "query_std": 0.02,',
        new='"position": "sincos", "init": "pytorch", "query_std": 0.02,',
        tests=(f"{TESTS}/test_position.py::test_an_adapter_saved_without_the_fields_computes_what_it_did",),
        why="a trained adapter answers from features it never saw",
    ),
    Mutant(
        name="the-instruction-drowns-the-queries",
        kind="wrong measure",
        file=f"{HIA}/extractor.py",
        old="unit_variance_(self.condition, gain=CONDITION_GAIN)",
        new="unit_variance_(self.condition)",
        tests=(f"{TESTS}/test_start.py::test_projections_start_at_unit_variance",),
        why="all queries start as one",
    ),
    Mutant(
        name="biases-as-large-as-the-signal",
        kind="lost state",
        file=f"{HIA}/extractor.py",
        old="nn.init.zeros_(linear.bias)",
        new="nn.init.ones_(linear.bias)",
        tests=(f"{TESTS}/test_start.py::test_projections_start_at_unit_variance",),
        why="queries, keys and visual tokens start alike",
    ),
    Mutant(
        name="residual-without-the-instruction",
        kind="lost residual",
        file=f"{HIA}/extractor.py",
        old="extracted + conditioned[image_to_sample].flatten(0, 1)",
        new="extracted + self.queries.repeat(len(image_to_sample), 1)",
        tests=(f"{TESTS}/test_modules.py::test_extractor_is_the_papers_cross_attention",),
        why="what is injected depends on the question less than it says",
    ),
)

STATISTICS = (
    Mutant(
        name="variance-without-the-means-spread",
        kind="lost part of a sum",
        file=f"{HIA}/calibration.py",
        old="count * (spread + mean.square())",
        new="count * spread",
        tests=(f"{TESTS}/test_start.py::test_calibration_measures_all_pixels",),
        why="calibrated norms divide by too little",
    ),
    Mutant(
        name="calibration-leaves-norms-training",
        kind="lost state",
        file=f"{HIA}/calibration.py",
        old="norm.train(training)",
        new="norm.train()",
        tests=(f"{TESTS}/test_start.py::test_calibration_measures_all_pixels",),
        why="every answer moves the statistics of the next one",
    ),
    Mutant(
        name="a-frozen-host-drops-out",
        kind="lost state",
        file=f"{HIA}/training.py",
        old="    base.eval()",
        new="    base.train(training)",
        tests=(f"{TESTS}/test_start.py::test_a_frozen_host_has_no_dropout_in_training",),
        why="the adapter is trained against a host that is never asked so",
    ),
    Mutant(
        name="lora-without-its-dropout",
        kind="lost state",
        file=f"{HIA}/training.py",
        old="                added.train()",
        new="                added.eval()",
        tests=(f"{TESTS}/test_start.py::test_what_is_trained_in_the_host_follows",),
        why="LoRA beside the adapter overfits",
    ),
    Mutant(
        name="checkpointing-switched-off",
        kind="silent fallback",
        file=f"{HIA}/training.py",
        old="module.training = True  # not .train()",
        new="module.training = False  # not .train()",
        tests=(f"{TESTS}/test_start.py::test_checkpointing_still_recomputes",),
        why="a training step that should fit a card runs out of memory",
    ),
    Mutant(
        name="encoder-at-the-full-rate",
        kind="wrong measure",
        file=f"{HIA}/training.py",
        old='"encoder": lr * encoder_lr_scale',
        new='"encoder": lr',
        tests=(f"{TESTS}/test_start.py::test_parameter_groups_hold_every_trained_parameter_once",),
        why="an encoder with fixed statistics does not learn",
    ),
)

JUDGED = (
    Mutant(
        name="low-resolution-in-name-only",
        kind="silent fallback",
        file=f"{HIA}/resolution.py",
        old="    if config.high_resolution:",
        new="    if config is not None:",
        after="def limited(",
        tests=(f"{TESTS}/test_resolution.py::test_raw_pixels_are_resized_as_the_processor_does_it",),
        why="the ablation without high resolution measures the full model",
    ),
    Mutant(
        name="one-mean-for-all-images",
        kind="wrong index",
        file=f"{HIA}/probe.py",
        old="self.images = flat[self.rows]",
        new="self.images = flat[self.rows] * 0",
        tests=(f"{TESTS}/test_probe.py::test_losses_are_the_hosts_own",),
        why="probe_layers takes more from the host than where things are, and advises other layers",
    ),
    Mutant(
        name="half-an-answer-counts",
        kind="wrong measure",
        file=f"{HIA}/phantom/batches.py",
        old="(labels == IGNORED)).all(1)",
        new="(labels == IGNORED)).any(1)",
        tests=(f"{TESTS}/test_tiny_host.py::test_a_score_counts_whole_answers",),
        why="every adapter seems to have learnt everything",
    ),
    Mutant(
        name="left-is-right",
        kind="wrong index",
        file=f"{HIA}/phantom/studies.py",
        old="lesion.column > (width - 1) / 2",
        new="lesion.column < (width - 1) / 2",
        tests=(f"{TESTS}/test_phantom.py::test_a_lesion_lies_in_its_quadrant_and_off_the_midlines",),
        why="the truth that answers are scored by is wrong",
    ),
    Mutant(
        name="held-out-phantoms-are-the-trained-ones",
        kind="wrong index",
        file="bench/ablation/train.py",
        old="TRAIN, TEST, MASKS = 1, 2, 3",
        new="TRAIN, TEST, MASKS = 1, 1, 3",
        tests=("tests/bench/test_ablation.py::test_held_out_phantoms_are_others",),
        why="the ablation scores what was learnt by heart",
    ),
)

MUTANTS = (*START, *STATISTICS, *JUDGED)
