"""The environment of a result: device, versions, commit, command."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "triton", "numpy", "hia-kernels")
REPOSITORY = Path(__file__).resolve().parents[2]
# what the benchmarks write themselves: an earlier step's records don't make a later step's code another one
OUTPUTS = ("bench/results", "docs/benchmarks")
COMMIT_VARIABLE = "BENCH_COMMIT"
SHORT = 12  # characters of a commit
typed: list[str] = []  # the arguments of the command that is running; bench.cli sets them


def cpu_name() -> str:
    """Return the CPU's model name, or the machine type where the system doesn't tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def device_name(device: str) -> str:
    """Return the GPU's name for "cuda", else the CPU's."""
    if device != "cuda":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name()


def slug(name: str) -> str:
    """Return a folder's name: lower case, letters and digits joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def command() -> str:
    """Return the command that is running, as it was typed."""
    return shlex.join(["python", "-m", "bench", *typed])


def describe(device: str) -> dict[str, Any]:
    """Return everything one needs to judge or repeat a number, made on "cpu" or "cuda"."""
    import torch

    environment: dict[str, Any] = {
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
        **revision(),
        "command": command(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        environment |= {"cuda": torch.version.cuda, "gpu_memory_bytes": properties.total_memory}
        environment |= {"cudnn": torch.backends.cudnn.version(), **_gpu_facts(properties)}
    return environment


def revision() -> dict[str, Any]:
    """Return the commit of this checkout, and whether it differs from it.

    Where the files were copied to another machine without their repository, ``BENCH_COMMIT`` names the commit that they
    are exactly those of.
    """
    named = os.environ.get(COMMIT_VARIABLE)
    if named:
        if not re.fullmatch(r"[0-9a-f]{7,40}", named):
            raise ValueError(f"{COMMIT_VARIABLE} must be a commit's hash, got {named!r}")
        return {"commit": named, "dirty": False, "commit_from": COMMIT_VARIABLE}
    return {"commit": git_or_none("rev-parse", "HEAD"), "dirty": dirty()}


def dirty() -> bool | None:
    """Tell whether the checkout differs from its commit, leaving out what the benchmarks write.

    Returns:
        None outside a repository.
    """
    status = git_or_none("status", "--porcelain", "--", ".", *(f":(exclude){folder}" for folder in OUTPUTS))
    return None if status is None else bool(status)


def _gpu_facts(properties: Any) -> dict[str, Any]:
    """Ask nvidia-smi for driver and power limit in watts; None for what it doesn't say."""
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


def versions() -> dict[str, str | None]:
    """Return the versions of what results depend on; None of what isn't installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git(*arguments: str, root: Path | None = None) -> str:
    """Run git and return its output, without the white space around it.

    Args:
        arguments: of the command.
        root: of a repository; None takes this one.

    Raises:
        RuntimeError: it failed, or isn't there; with what it says.
    """
    command = ["git", "-C", str(root or REPOSITORY), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"git {' '.join(arguments)}: {error}") from error
    if done.returncode:
        raise RuntimeError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def git_or_none(*arguments: str, root: Path | None = None) -> str | None:
    """Return what :func:`git` does; None outside a repository, without git, or before the first commit."""
    try:
        return git(*arguments, root=root)
    except RuntimeError:
        return None


def without_folders(command: str) -> str:
    """Leave out of a command where caches and results lie: it changes no result, and is somebody's own."""
    return re.sub(r" --(?:cache|out)[ =]\S+", "", command)


def commit_of(environment: dict[str, Any]) -> str:
    """Name the commit of a record's environment in a line of text, and whether there were changes."""
    commit = str(environment.get("commit") or "unknown")[:SHORT]
    return f"{commit} with uncommitted changes" if environment.get("dirty") else commit


def line_of(environment: dict[str, Any]) -> str:
    """Return where a number was made, for the line below a table of text."""
    return (
        f"`{environment['command']}` at commit {commit_of(environment)}, {environment['device']}, "
        f"{environment['threads']} threads, torch {environment['versions']['torch']}"
    )
