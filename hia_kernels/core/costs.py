"""Helpers of the cost functions in every op's ``inputs.py``."""

from __future__ import annotations

INDEX_BYTES = 8  # of an int64 row index


def in_mode(mode: str, forward: int, backward: int) -> int:
    """Return the cost of a pass, or of both.

    Raises:
        ValueError: ``mode`` is none of "forward", "backward" and "both".
    """
    costs = {"forward": forward, "backward": backward, "both": forward + backward}
    if mode not in costs:
        raise ValueError(f"hia_kernels.core.costs: mode must be among {', '.join(costs)}, got {mode!r}")
    return costs[mode]


def statistics_itemsize(itemsize: int) -> int:
    """Return the bytes of a scale, shift or log-sum-exp beside elements of ``itemsize`` bytes."""
    return max(4, itemsize)
