"""Faults in the adapter and its runtime, python/hia."""

from __future__ import annotations

from .mutant import Mutant

HIA = "python/hia"
TESTS = "tests/hia"

HOOKS = (
    Mutant(
        name="unload-leaves-a-hook-behind",
        kind="hook left behind",
        file=f"{HIA}/runtime/hooks.py",
        old="for handle in self._handles:",
        new="for handle in self._handles[1:]:",
        tests=(f"{TESTS}/test_model.py::test_unload_restores_the_host",),
        why="a host that was given back still runs the adapter's code",
    ),
    Mutant(
        name="an-exception-leaves-the-prompt-open",
        kind="hook left behind",
        file=f"{HIA}/runtime/model.py",
        old="self._hooks.prompt = self._hooks.running = None",
        new="self._hooks.running = None",
        tests=(f"{TESTS}/test_model.py::test_an_exception_inside_forward_leaves_nothing_behind",),
        why="the next prompt without images is injected with the last one's",
    ),
    Mutant(
        name="hooks-one-layer-too-early",
        kind="wrong index",
        file=f"{HIA}/runtime/hooks.py",
        old="host.layers[index].register_forward_hook",
        new="host.layers[index - 1].register_forward_hook",
        tests=(f"{TESTS}/test_model.py::test_only_visual_rows_of_the_chosen_layers_output_change",),
        why="the adapter speaks to layers that it was not trained for",
    ),
    Mutant(
        name="beams-see-other-samples-images",
        kind="wrong order",
        file=f"{HIA}/layers/layout.py",
        old="images * copies + copy for images in owned for copy in range(copies)",
        new="images * copies + copy for copy in range(copies) for images in owned",
        tests=(f"{TESTS}/test_generate.py::test_every_beam_sees_its_own_samples_images",),
        why="with beam search one patient's radiograph is shown to another's question",
    ),
)

WEIGHTS = (
    Mutant(
        name="folded-weights-outlive-an-update",
        kind="stale cache",
        file=f"{HIA}/versions.py",
        old="_address(x), x._version, x.dtype",
        new="_address(x), 0, x.dtype",
        tests=(f"{TESTS}/test_plan.py::test_loading_and_casting_drop_folded_weights",),
        why="weights that were loaded after fold_weights() are never used",
    ),
    Mutant(
        name="kept-keys-outlive-an-update",
        kind="stale cache",
        file=f"{HIA}/layers/features.py",
        old="if versions is not None and versions.get(layer) != first.version:",
        new="if versions is not None and layer not in versions:",
        tests=(f"{TESTS}/test_plan.py::test_what_is_kept_is_counted_and_used_until_weights_change",),
        why="a second question is answered with the keys of weights that are gone",
    ),
    Mutant(
        name="absorbed-values-lose-their-bias",
        kind="lost part of a sum",
        file=f"{HIA}/layers/extractor.py",
        old="return out.flatten(0, 1) + bias[dim:]",
        new="return out.flatten(0, 1) + bias[:dim]",
        tests=(f"{TESTS}/test_plan.py::test_every_form_is_the_direct_ones_in_double",),
        why="another form of the same maths is picked at another size, and gives another result",
    ),
    Mutant(
        name="weights-are-folded-in-half",
        kind="wrong dtype of a sum",
        file=f"{HIA}/layers/folded.py",
        old="exact = torch.float64 if dtype == torch.float64 else torch.float32",
        new="exact = dtype",
        tests=(f"{TESTS}/test_plan.py::test_weights_are_folded_in_fp32_and_rounded_once",),
        why="products of weights are rounded on the way, once for every fold",
    ),
    Mutant(
        name="weights-read-outside-a-units-call",
        kind="missing check",
        file=f"{HIA}/layers/adapter.py",
        old="layer.inside(extractor.inside, extractor.cached_tokens, features, kind)",
        new="extractor.cached_tokens(features, kind)",
        tests=(f"{TESTS}/test_units.py::test_offloaded_units_give_the_same_bits",),
        why="what is kept of images is computed from weights that are sharded or offloaded",
    ),
    Mutant(
        name="results-lie-in-the-workspace",
        kind="stale cache",
        file=f"{HIA}/encoder/executor.py",
        old="return out.clone() if self.workspace is not None and self.workspace.holds(out) else out",
        new="return out",
        tests=(f"{TESTS}/test_encoder_workspace.py::test_results_are_the_callers",),
        why="the features of one image turn into the next one's",
    ),
    Mutant(
        name="attaching-changes-the-host",
        kind="lost state",
        file=f"{HIA}/layers/injection.py",
        old="nn.init.zeros_(self.out_proj.bias)",
        new="nn.init.ones_(self.out_proj.bias)",
        tests=(f"{TESTS}/test_model.py::test_attaching_leaves_logits_bit_identical",),
        why="an adapter that was never trained disturbs the frozen model",
    ),
    Mutant(
        name="checkpoint-lacks-the-statistics",
        kind="lost state",
        file=f"{HIA}/runtime/checkpoint.py",
        old="for name, tensor in adapter.state_dict().items()}",
        new="for name, tensor in adapter.named_parameters()}",
        tests=(f"{TESTS}/test_checkpoint.py::test_round_trip",),
        why="a saved adapter comes back without its batch-norms' running statistics",
    ),
    Mutant(
        name="an-older-files-choices-are-ignored",
        kind="silent fallback",
        file=f"{HIA}/runtime/model.py",
        old="model = cls(base, config, **followed, **options)",
        new="model = cls(base, config, **options)",
        tests=(f"{TESTS}/test_checkpoint.py::test_an_older_file_is_followed_with_one_warning",),
        why="an adapter saved without high resolution is measured with it",
    ),
    Mutant(
        name="a-checkpoint-may-lack-tensors",
        kind="missing check",
        file=f"{HIA}/runtime/checkpoint.py",
        old="if missing := sorted(set(expected) - set(tensors)):",
        new="if missing := sorted(set(tensors) - set(tensors)):",
        tests=(f"{TESTS}/test_checkpoint.py::test_missing_extra_and_wrong_shaped_tensors_are_listed",),
        why="the error of a checkpoint that lacks tensors does not name them",
    ),
)

INPUTS = (
    Mutant(
        name="instruction-token-from-the-answer",
        kind="wrong index",
        file=f"{HIA}/images/processor.py",
        old="instruction_index[row] = start + len(prompt) - 1",
        new="instruction_index[row] = start + used - 1",
        tests=(f"{TESTS}/test_training.py::test_training_and_generation_condition_on_the_same_token",),
        why="in training the answer leaks into the visual tokens",
    ),
    Mutant(
        name="padding-on-the-other-side",
        kind="wrong order",
        file=f"{HIA}/images/processor.py",
        old='start = longest - used if side == "left" else 0',
        new='start = longest - used if side == "right" else 0',
        tests=(f"{TESTS}/test_processor.py::test_padding_lies_on_the_side_asked_for",),
        why="generation would go on behind padding",
    ),
    Mutant(
        name="dicom-window-half-a-pixel-off",
        kind="wrong window",
        file=f"{HIA}/images/dicom.py",
        old="return first[0] - 0.5 - half, first[0] - 0.5 + half",
        new="return first[0] - half, first[0] + half",
        tests=(f"{TESTS}/test_images.py::test_dicom_windows",),
        why="DICOM's linear window is not the standard's",
    ),
    Mutant(
        name="negative-radiograph-shown-as-positive",
        kind="wrong window",
        file=f"{HIA}/images/dicom.py",
        old="low, high = high, low",
        new="low, high = low, high",
        tests=(f"{TESTS}/test_images.py::test_dicom_windows",),
        why="MONOCHROME1 images reach the encoder as negatives",
    ),
    Mutant(
        name="16-bit-image-in-an-8-bit-window",
        kind="wrong window",
        file=f"{HIA}/images/load.py",
        old="if pixels.dtype == torch.uint8:",
        new="if not pixels.is_floating_point():",
        tests=(f"{TESTS}/test_images.py::test_kinds_of_images",),
        why="all but the darkest pixels of a 16-bit radiograph are white",
    ),
)

ENCODER = (
    Mutant(
        name="strips-see-the-edge-of-their-cut",
        kind="off by one at an edge",
        file=f"{HIA}/encoder/strips.py",
        old="above * stride : (stop + STEM_HALO) * stride]",
        new="above * stride : stop * stride]",
        tests=(f"{TESTS}/test_encoder_strips.py::test_other_dtypes",),
        why="large images have seams between their strips",
    ),
    Mutant(
        name="strips-forget-the-rows-before",
        kind="lost part of a sum",
        file=f"{HIA}/encoder/strips.py",
        old="above = _zero_row(parts[0]) if self.kept is None else self.kept",
        new="above = _zero_row(parts[0]) if self.kept is None else torch.zeros_like(self.kept)",
        tests=(f"{TESTS}/test_encoder_strips.py::test_strips_are_the_whole",),
        why="every strip starts as if it were the top of the image",
    ),
    Mutant(
        name="batch-norm-learns-from-one-image",
        kind="lost state",
        file=f"{HIA}/encoder/encoder.py",
        old="if not self.live_statistics:",
        new="if self.live_statistics:",
        tests=(f"{TESTS}/test_modules.py::test_batch_norm_statistics_stay_in_training_unless_asked",),
        why="training with one image a step ruins the encoder's statistics",
    ),
)

GRAPHS = (
    Mutant(
        name="graphs-outlive-their-weights",
        kind="stale cache",
        file=f"{HIA}/cuda_graphs.py",
        old="if graph is not None and graph.weights == call.weights:",
        new="if graph is not None:",
        tests=(f"{TESTS}/test_layer_graphs.py::test_an_update_ends_the_graphs_of_its_layer",),
        why="a replay reads weights where they were before they were loaded or moved",
    ),
    Mutant(
        name="a-graph-outlives-its-plan",
        kind="stale cache",
        file=f"{HIA}/layers/graphs.py",
        old="self.read, self.forms, requested_backend())",
        new="self.read, requested_backend())",
        tests=(f"{TESTS}/test_layer_graphs.py::test_every_kind_of_call_has_a_graph_of_its_own[plan]",),
        why="set_plan() changes nothing for images of sizes that were asked about before",
    ),
    Mutant(
        name="a-replay-is-conditioned-on-another-token",
        kind="wrong index",
        file=f"{HIA}/layers/graphs.py",
        old="torch.index_select(self.rows, 0, self.layout.instruction_rows, out=instructions)",
        new="torch.index_select(self.rows, 0, self.layout.written_rows[: len(instructions)], out=instructions)",
        tests=(f"{TESTS}/test_layer_graphs.py::test_every_question_about_images_of_the_same_sizes_is_one_graph",),
        why="from the second question on, an image's details no longer follow what is asked",
    ),
    Mutant(
        name="a-replay-forgets-the-other-beams",
        kind="lost part of a sum",
        file=f"{HIA}/layers/graphs.py",
        old="return self.rows.index_copy_(0, self.layout.written_rows, result)",
        new="rows = self.layout.visual_rows; return self.rows.index_copy_(0, rows, result[: len(rows)])",
        tests=(f"{TESTS}/test_layer_graphs.py::test_every_copy_of_a_sample_is_written",),
        why="with beam search all beams but the first see no image from the second question on",
    ),
)

MUTANTS = (*HOOKS, *WEIGHTS, *INPUTS, *ENCODER, *GRAPHS)
