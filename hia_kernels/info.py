"""``python -m hia_kernels.info``: versions, devices and what can run each op here, and why the rest can't.

Every probe is guarded by itself: a broken optional package is a line of the report, not a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .core import backend, settings, tuning

VARIABLES = ("HIA_BACKEND", *settings.CHOICES)
DEVICE_OF = {  # in the matrix's order
    "triton": "CUDA",
    "cudnn": "CUDA",
    "cublas": "CUDA",
    "flash_attn": "CUDA",
    "sdpa_flash": "CUDA",
    "xformers": "CUDA",
    "sdpa_efficient": "CUDA",
    "native": "x86-64",
    "cpu": "CPU",
    "reference": "any",
}
MEASURED = ("conv_norm_act", "cross_attention")  # whose rows ask what was measured on the device
NOT_MEASURED = "no backends were measured against each other on this device"
PACKAGES = {
    "triton": "triton",
    "flash-attn": "flash_attn",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute",
    "xformers": "xformers",
    "transformers": "transformers",
}


def _probe(read: Callable[[], Any]) -> Any:
    """Return what ``read`` says, or what went wrong with it."""
    try:
        return read()
    except Exception as error:
        return f"broken: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def package_version(module: str) -> str:
    """Return the version of an importable package, or "not installed"; raise what else goes wrong on importing it."""
    try:
        return str(getattr(importlib.import_module(module), "__version__", "installed, version unknown"))
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            return "not installed"
        raise


def commit() -> str | None:
    """Return the checkout's commit, ``+changes`` if the working tree differs from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):  # no git here, or no commit yet
        return None


def versions() -> dict[str, Any]:
    """List the versions of this package and of all it may use."""
    found: dict[str, Any] = {"hia-kernels": __version__, "commit": commit(), "python": platform.python_version()}
    found["torch"] = torch.__version__
    found["CUDA"] = torch.version.cuda or "not in this build of torch"
    found["cuDNN"] = _probe(lambda: torch.backends.cudnn.version() or "not in this build of torch")
    return found | {name: _probe(partial(package_version, module)) for name, module in PACKAGES.items()}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = round(properties.total_memory / 2**30, 1)
        found.append({"name": properties.name, "memory_gib": memory, "capability": capability})
    return found


def devices() -> dict[str, Any]:
    """Describe the CPU and every CUDA device."""
    cpu = {
        "model": _probe(_cpu_model),
        "threads": _probe(torch.get_num_threads),
        "instructions": _probe(torch.backends.cpu.get_cpu_capability),
    }
    return {"cpu": cpu, "cuda": _probe(_gpus)}


def op_backends(table: backend.BackendTable) -> dict[str, list[str]]:
    """List for each row of the table, by its name, why it can't run here; an empty list where it can."""
    reasons = {}
    for row in table.backends:
        found = _probe(row.unavailable_reasons)
        reasons[row.name] = [found] if isinstance(found, str) else list(found)
    return reasons


def measured() -> dict[str, dict[str, int]]:
    """Count the shapes at which each backend was measured to be the fastest on the first CUDA device, op by op."""
    found: dict[str, dict[str, int]] = {op: {} for op in MEASURED}
    if torch.cuda.is_available():
        for name, best in tuning.backends_of(torch.device("cuda", 0)).items():
            counts = found.setdefault(name.partition("/")[0], {})
            counts[best] = counts.get(best, 0) + 1
    return found


def forcing(name: str) -> dict[str, list[str]]:
    """List what forcing a backend means, op by op.

    Returns:
        ``forced``: the ops that have a row of that name; ``auto``: the others; ``backward by auto``: those of the
        first whose row computes no gradients.
    """
    found: dict[str, list[str]] = {"forced": [], "auto": [], "backward by auto": []}
    for op, table in sorted(backend.TABLES.items()):
        row = table.row(name)
        found["auto" if row is None else "forced"].append(op)
        gradients = {function for one in table.backends for function in one.functions if function.endswith("_bwd")}
        if row is not None and gradients - set(row.functions):
            found["backward by auto"].append(op)
    return found


def collect() -> dict[str, Any]:
    """Return the whole report, ready for JSON."""
    return {
        "versions": versions(),
        "devices": devices(),
        "environment": {name: os.environ.get(name) for name in VARIABLES} | {"in force": _probe(_in_force)},
        "ops": {op: op_backends(table) for op, table in sorted(backend.TABLES.items())},
        "measured": _probe(measured),
        "forcing": {name: forcing(name) for name in backend.backend_names()[1:]},  # all but "auto"
    }


def _in_force() -> str:
    for name in settings.CHOICES:
        settings.read(name)
    wanted, isa = backend.requested_backend(), settings.read("HIA_CPU_ISA") or "the best there is"
    left = [] if wanted == backend.AUTO else forcing(wanted)["auto"]
    others = f" ({', '.join(left)}: auto)" if left else ""
    return f"backend {wanted}{others}, debug {'on' if backend.debug_enabled() else 'off'}, CPU ISA {isa}"


def _text(report: dict[str, Any]) -> str:
    lines = ["versions"]
    lines += [f"  {name:<13} {value if value is not None else '-'}" for name, value in report["versions"].items()]
    cpu, gpus = report["devices"]["cpu"], report["devices"]["cuda"]
    lines += ["devices", f"  cpu           {cpu['model']}, {cpu['threads']} threads, {cpu['instructions']}"]
    if isinstance(gpus, str):
        lines.append(f"  cuda          {gpus}")
    for index, gpu in enumerate(gpus if isinstance(gpus, list) else []):
        lines.append(f"  cuda:{index}        {gpu['name']}, {gpu['memory_gib']} GiB, sm {gpu['capability']}")
    if not gpus:
        lines.append("  cuda          no device")
    lines.append("environment")
    lines += [f"  {name:<13} {'not set' if value is None else value}" for name, value in report["environment"].items()]
    for op, reasons in report["ops"].items():
        lines.append(op)
        by_reason: dict[str, list[str]] = {}
        for name, why in reasons.items():
            by_reason.setdefault("no: " + "; ".join(why) if why else "available", []).append(name)
        lines += [f"  {', '.join(names):<13} {verdict}" for verdict, names in by_reason.items()]
    lines += ["auto", "  of every op: the first of its rows above that can serve the call"]
    lines += _measured_lines(report["measured"])
    lines.append("forcing a backend: ops without a row of that name run auto")
    for name, found in report["forcing"].items():
        others = [f"{how}: {', '.join(ops)}" for how, ops in found.items() if ops and how != "forced"]
        lines.append(f"  {name:<13} {'; '.join(others) if others else 'every op has it'}")
    return "\n".join(lines)


def _measured_lines(found: dict[str, dict[str, int]] | str) -> list[str]:
    if isinstance(found, str):
        return [f"  measurements: {found}"]
    lines = []
    for op, counts in found.items():
        shapes = ", ".join(f"{name} at {count}" for name, count in sorted(counts.items()))
        what = f"where it was measured on this device, the fastest ({shapes} shapes)" if counts else NOT_MEASURED
        lines.append(f"  {op}: {what}")
    return lines


def support_matrix() -> str:
    """Return the operators by their backends as a Markdown table: F forward, B backward.

    It is read off the tables that dispatch uses, so it is the same on every machine.
    """
    rows = {op: {row.name: row.functions for row in table.backends} for op, table in sorted(backend.TABLES.items())}
    there = {name for functions in rows.values() for name in functions}
    columns = [name for name in DEVICE_OF if name in there] + sorted(there - set(DEVICE_OF))
    titles = [f"`{name}` ({DEVICE_OF[name]})" if name in DEVICE_OF else f"`{name}`" for name in columns]
    lines = [" | ".join(["| operator", *titles]) + " |", "|---" + "|:---:" * len(columns) + "|"]
    for op, by_name in rows.items():
        cells = []
        for name in columns:
            functions = by_name.get(name, {})
            backward = any(function.endswith(backend.BACKWARD) for function in functions)
            cells.append("" if not functions else "F B" if backward else "F")
        lines.append(" | ".join([f"| `{op}`", *cells]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m hia_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable, to standard output")
    parser.add_argument("--matrix", action="store_true", help="the operators by their backends alone, in Markdown")
    options = parser.parse_args(arguments)
    if options.matrix:
        print(support_matrix())
        return
    report = collect()
    print(json.dumps(report, indent=2) if options.json else _text(report))


if __name__ == "__main__":
    main()
