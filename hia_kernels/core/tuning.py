"""Block sizes by device: static heuristics in each launcher, overridden by what was measured on the device.

Nothing here times a kernel. ``tuned/<device>.json`` holds at most one configuration a key, and at most one backend a
shape; a benchmark writes it (``python -m bench tune``), launchers read it through :func:`pick`, tables of backends
through :func:`measured_backend`, and tests use the heuristics alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import settings
from .backend import backend_names

FOLDER = Path(__file__).with_name("tuned")
# devices that take another one's measurements where they have no file: the same processor, with other memory
SIBLINGS = {"nvidia-h200": "nvidia-h100-80gb-hbm3", "nvidia-h200-nvl": "nvidia-h100-80gb-hbm3"}
Config = Mapping[str, int]  # meta-parameters of a launch: BLOCK_*, num_warps, num_stages


def device_slug(name: str) -> str:
    """Return a device's name as a file name: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def _slug(index: int) -> str:
    return device_slug(torch.cuda.get_device_name(index))


@cache
def stored(slug: str) -> dict[str, dict[str, int]]:
    """Return the configurations measured on a device, {"<op>/<key>": configuration}; empty where none were.

    Raises:
        ValueError: the file is damaged.
    """
    return _read(slug, "configurations")


@cache
def stored_backends(slug: str) -> dict[str, str]:
    """Return the fastest backends on a device, {"<op>/<key>": name}; empty where none were measured.

    Raises:
        ValueError: the file is damaged.
    """
    found = _read(slug, "backends")
    unknown = sorted({str(name) for name in found.values()} - set(backend_names()))
    if unknown:
        path = FOLDER / f"{slug}.json"
        raise ValueError(f"hia_kernels.tuning: {path} must name backends, got: {', '.join(unknown)}")
    return found


def _read(slug: str, part: str) -> dict[str, Any]:
    path = FOLDER / f"{slug}.json"
    if not path.exists() and slug in SIBLINGS:
        path = FOLDER / f"{SIBLINGS[slug]}.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content.get(part, {}) if part == "backends" else content[part])  # files from before have none
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"hia_kernels.tuning: {path} must hold an object '{part}', got: {error!r}") from error


def _slug_of(device: torch.device) -> str | None:
    """Return the device's file name; None where no file counts."""
    if device.type != "cuda" or settings.read("HIA_TUNED") == "0":
        return None
    return _slug(torch.cuda.current_device() if device.index is None else device.index)


def pick(op: str, key: str, device: torch.device, heuristic: Config) -> dict[str, int]:
    """Return the configuration of a launch.

    Args:
        op: the op's name.
        key: of bucketed sizes and dtype, e.g. "fwd-d128-bf16"; never a raw token count.
        device: of the tensors.
        heuristic: right on every device; used unless this device's file has something for the key.

    Returns:
        ``heuristic``, with the stored values in place of its own. ``HIA_TUNED=0`` leaves them out.
    """
    slug = _slug_of(device)
    return dict(heuristic) if slug is None else {**heuristic, **stored(slug).get(f"{op}/{key}", {})}


def measured_backend(op: str, key: str, device: torch.device) -> str | None:
    """Return the fastest backend at a shape on this device; None where none was measured.

    Args:
        op: the op's name.
        key: of bucketed sizes and dtype, as :func:`pick`'s.
        device: of the tensors. ``HIA_TUNED=0`` leaves the measurements out.
    """
    slug = _slug_of(device)
    return None if slug is None else stored_backends(slug).get(f"{op}/{key}")


def backends_of(device: torch.device) -> dict[str, str]:
    """Return the fastest backends on this device, {"<op>/<key>": name}; empty where none were measured.

    Raises:
        ValueError: the device's file is damaged.
    """
    slug = _slug_of(device)
    return {} if slug is None else dict(stored_backends(slug))


def has_backends(op: str, device: torch.device) -> bool:
    """Tell whether backends of an op were measured against each other on this device, at any shape."""
    slug = _slug_of(device)
    return slug is not None and op in _ops_with_backends(slug)


@cache
def _ops_with_backends(slug: str) -> frozenset[str]:
    return frozenset(name.partition("/")[0] for name in stored_backends(slug))


def cdiv(size: int, part: int) -> int:
    """Divide, rounding up, as ``triton.cdiv`` does, which takes the host two microseconds a call."""
    return -(-size // part)


def bucket(size: int) -> int:
    """Return the power of two at or above ``size``: keys and meta-parameters must not follow every token count."""
    return 1 << max(0, size - 1).bit_length()
