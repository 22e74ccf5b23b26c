"""Choices of a run, which the weights don't depend on and no checkpoint holds: plan, resolution, statistics, graphs."""

from __future__ import annotations

from typing import TypeVar

from ..layers.adapter import HiAAdapter

Model = TypeVar("Model", bound="RunOptions")


class RunOptions:
    """The part of :class:`hia.HiAModel` that says how its adapter is run. Each choice can be changed at any time."""

    adapter: HiAAdapter
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
