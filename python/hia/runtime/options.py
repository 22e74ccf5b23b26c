"""Choices of a run, which no checkpoint holds: plan, folding, resolution, statistics, CUDA graphs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TypeVar

from ..config import HiAConfig
from ..hosts import LlamaHost
from ..layers import plan
from ..layers.adapter import HiAAdapter
from ..renamed import renamed
from . import resolution
from .attachment import layer_device

Model = TypeVar("Model", bound="RunOptions")


class RunOptions:
    """The part of :class:`hia.HiAModel` that says how its adapter is run. Each choice can be changed at any time."""

    adapter: HiAAdapter
    hia_config: HiAConfig
    _host: tuple[LlamaHost]
    _high_resolution: bool

    @property
    def plan(self) -> str:
        """Return the plan that :meth:`set_plan` chose."""
        return self.adapter.plan

    def set_plan(self: Model, plan: str) -> Model:
        """Choose which exact form of the maths runs; all give the same result up to rounding (docs/plans.md).

        Args:
            plan: "auto", the cheapest form for the sizes of each call; or "<extract>/<inject>" with names of
                :mod:`hia.layers.forms`, e.g. "direct/direct", which forces one.

        Returns:
            The model itself.

        Raises:
            ValueError: no such form. One that can't run for the sizes of a call is an error of that call.
        """
        self.adapter.set_plan(plan)
        return self

    def explain_plan(
        self, sizes: Sequence[tuple[int, int]], visual_tokens: int = 576, samples: int = 1, training: bool = False
    ) -> None:
        """Write to standard output which forms of the maths a call would take now, and what each would cost.

        Whether weights are folded, by whom, and the bytes that takes, stand below the table.

        Args:
            sizes: (height, width) of each image of the batch, pixels.
            visual_tokens: rows an image has in the host's sequence.
            samples: prompts the images belong to.
            training: with gradients.

        Raises:
            ValueError: no sizes, or ones that are not positive.
        """
        if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
            raise ValueError(f"hia: sizes must hold (height, width) of each image, at least one, got {list(sizes)}")
        host, index = self._host[0], self.hia_config.layer_indices[0]
        extractor = self.adapter.layer(index).extractor
        sizes = resolution.limited_sizes(self._high_resolution, host, sizes)
        asked = plan.sizes_of(self.hia_config, sizes, visual_tokens, samples, extractor.queries.element_size())
        folded = not training and extractor.current() is not None
        asked = dataclasses.replace(asked, training=training, weights_folded=folded)
        sys.stdout.write(plan.table(asked, layer_device(host.layers[index]).type, self.plan))
        sys.stdout.write(self.adapter.folding_state())

    @property
    def auto_fold(self) -> bool:
        """Tell whether weights fold by themselves."""
        return self.adapter.auto_fold

    def set_auto_fold(self: Model, auto_fold: bool) -> Model:
        """Choose whether weights fold by themselves from the second call on, in eval mode without gradients.

        What is folded so is dropped by any change of the weights and by ``train()``; calls that change weights in
        between count anew. See :meth:`fold_weights` for what folding does.

        Args:
            auto_fold: True is the default; False also drops what has folded by itself.

        Returns:
            The model itself.

        Raises:
            ValueError: neither True nor False.
        """
        self.adapter.set_auto_fold(auto_fold)
        return self

    def fold_weights(self: Model) -> Model:
        """Fold and pack the adapter's weights for inference, at once: same results up to rounding, fewer FLOPs.

        Parameters and state_dict stay as they are; calls that record gradients don't see the folded weights. When a
        parameter changes, what was folded from it is dropped, with a warning. Undone by :meth:`unfold_weights`.

        Returns:
            The model itself.
        """
        self.adapter.fold_weights()
        return self

    def unfold_weights(self: Model) -> Model:
        """Drop all folded weights. None fold by themselves any more, until :meth:`set_auto_fold` lets them.

        Returns:
            The model itself.
        """
        self.adapter.unfold_weights()
        return self

    prepare, unprepare = renamed("prepare", "fold_weights"), renamed("unprepare", "unfold_weights")

    @property
    def high_resolution(self) -> bool:
        """Tell whether the adapter sees images at their own resolution."""
        return self._high_resolution

    def set_high_resolution(self: Model, high_resolution: bool) -> Model:
        """Let the adapter see images at their own resolution, or shrink them to the host's (paper, Table 2).

        Returns:
            The model itself.

        Raises:
            ValueError: neither True nor False.
        """
        if not isinstance(high_resolution, bool):
            raise ValueError(f"hia: high_resolution must be True or False, got {high_resolution!r}")
        self._high_resolution = high_resolution
        return self

    @property
    def batch_norm(self) -> str:
        """Return the statistics that the encoder's batch-norm takes in training."""
        return "batch" if self.adapter.encoder.live_statistics else "running"

    def set_batch_norm(self: Model, statistics: str) -> Model:
        """Choose the statistics that the encoder's batch-norm takes in training.

        Args:
            statistics: "running" ones, which never move then, or those of the "batch".

        Returns:
            The model itself.

        Raises:
            ValueError: neither of them.
        """
        self.adapter.encoder.set_batch_norm(statistics)
        return self

    @property
    def cuda_graphs(self) -> bool:
        """Tell whether the adapter may run as CUDA graphs (docs/adapter.md, "CUDA graphs")."""
        return self.adapter.cuda_graphs

    def set_cuda_graphs(self: Model, cuda_graphs: bool) -> Model:
        """Allow CUDA graphs of encoder and layers, which keep memory for their buffers; False drops those there are.

        Returns:
            The model itself.

        Raises:
            ValueError: neither True nor False.
        """
        self.adapter.set_cuda_graphs(cuda_graphs)
        return self
