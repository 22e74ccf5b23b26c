"""Where a result was made: device, versions, commit, command."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "triton", "numpy", "hia-kernels")
REPOSITORY = Path(__file__).resolve().parents[2]
# what the benchmarks write themselves: an earlier step's records don't make a later step's code another one
OUTPUTS = ("bench/results", "docs/benchmarks")


def cpu_name() -> str:
    """The CPU's model name, or the machine type where the system doesn't tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def device_name(device: str) -> str:
    """The GPU's name for "cuda", else the CPU's."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def slug(name: str) -> str:
    """A folder name: lower case, letters and digits joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: str, module: str = "bench.table3.run") -> dict[str, Any]:
    """Everything one needs to judge or repeat a number.

    Args:
        device: "cpu" or "cuda".
        module: that was run, for the command.
    """
    environment: dict[str, Any] = {
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": dirty(),
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        environment |= {"cuda": torch.version.cuda, "gpu_memory_bytes": properties.total_memory}
        environment |= {"cudnn": torch.backends.cudnn.version(), **_gpu_facts(properties)}
    return environment


def dirty() -> bool | None:
    """Whether the checkout differs from its commit, what the benchmarks write left out; None outside a repository."""
    status = _git("status", "--porcelain", "--", ".", *(f":(exclude){folder}" for folder in OUTPUTS))
    return None if status is None else bool(status)


def _gpu_facts(properties: Any) -> dict[str, Any]:
    """Driver and power limit in watts, by nvidia-smi; None for what it doesn't say."""
    device = f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else "0"
    command = ["nvidia-smi", "-i", device, "--query-gpu=driver_version,power.limit", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {"driver": None, "power_limit_w": None}
    # a field it doesn't know reads "[N/A]" or "[Not Supported]"; the other one is still good
    driver, power = (part.strip() for part in (done.stdout.strip() + ",").split(",")[:2])
    return {"driver": None if driver.startswith("[") else driver or None, "power_limit_w": _number(power)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """The command's output; None outside a repository, without git, or before the first commit."""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
