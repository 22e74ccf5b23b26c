"""Block sizes by device: static heuristics in each launcher, and what was measured to be better, by device name.

Nothing here times a kernel. ``tuned/<device>.json`` holds at most one configuration a key; a benchmark writes it
(``python -m bench.tune``), launchers read it through :func:`pick`, and tests see the heuristics alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("tuned")
Config = Mapping[str, int]  # meta-parameters of a launch: BLOCK_*, num_warps, num_stages


def device_slug(name: str) -> str:
    """A device's name as a file's: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@cache
def stored(slug: str) -> dict[str, dict[str, int]]:
    """What was measured on a device: {"<op>/<key>": configuration}; empty where nothing was.

    Raises:
        ValueError: the file is damaged.
    """
    path = FOLDER / f"{slug}.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["configurations"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"hia_kernels.tuning: {path} must hold an object 'configurations', got: {error!r}") from error


def pick(op: str, key: str, device: torch.device, heuristic: Config) -> dict[str, int]:
    """The configuration of a launch.

    Args:
        op: the op's name.
        key: of bucketed sizes and dtype, e.g. "fwd-d128-bf16"; never a raw token count.
        device: of the tensors.
        heuristic: right on every device; used unless this device's file has something for the key.

    Returns:
        ``heuristic``, with the stored values in place of its own. ``HIA_TUNED=0`` leaves them out.
    """
    if device.type != "cuda" or os.environ.get("HIA_TUNED", "1") == "0":
        return dict(heuristic)
    index = torch.cuda.current_device() if device.index is None else device.index
    return {**heuristic, **stored(device_slug(_device_name(index))).get(f"{op}/{key}", {})}


def bucket(size: int) -> int:
    """The power of two at or above ``size``: keys and meta-parameters must not follow every token count."""
    return 1 << max(0, size - 1).bit_length()
