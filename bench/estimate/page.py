"""docs/estimates.md: each workload's roofline, its estimate, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from ..launches.record import Launch
from ..records import markdown
from ..records.environment import REPOSITORY, SHORT
from ..records.record import Measurement
from .collect import Work
from .compiled import Compiled
from .measured import Key
from .model import Ceilings, Kernel, estimate_s, kernels
from .occupancy import BLOCKS, MULTIPROCESSORS, REGISTERS, REGISTERS_STEP, RESERVED, SHARED, THREADS, WARP

Devices = Mapping[Ceilings, Mapping[Key, Measurement]]  # what was measured on each
PATH = REPOSITORY / "docs" / "estimates.md"
TEXT = ("case", "mode", "longest kernel")
HEADER = (
    *("case", "mode", "GFLOP", "MB", "kernels", "longest kernel", "registers / KiB / warps", "programs", "resident"),
    *("waves", "fill", "matrix instructions"),
)
INTRODUCTION = f"""\
**No figure below is a measurement, except in the columns that say so.** Shapes give FLOPs and bytes, the compiled \
kernels the rest: every launch is recorded and compiled for sm_90 without a GPU, forward without gradients and \
backward, in bf16, with the backends and configurations that were chosen for an H100 by measurement where there are \
any. Composites (`encode`, `extract`, ...) run with folded weights; `encode` is all of ResNet-50, stem included.

| column | what it is |
| --- | --- |
| GFLOP, MB | matrix products, 2 FLOPs a multiply-add, and bytes that must move at least: of the mathematics, \
`ops/<op>/inputs.py`; of a composite its cheapest exact form, `bench/measure/costs.py` |
| roofline | max(bytes / bandwidth, FLOPs / rate) of the two |
| kernels | Triton's launches + kernels of libraries (cuBLAS, cuDNN, PyTorch) |
| longest kernel | the one with the largest estimated time; the columns up to "matrix instructions" are its own |
| resident | its programs on a multiprocessor at once: the least of {REGISTERS} registers / (registers a thread, \
rounded up to {REGISTERS_STEP}, x threads), {SHARED // 1024} KiB / (shared memory + {RESERVED // 1024} KiB), \
{THREADS} threads / ({WARP} x warps) and {BLOCKS} |
| waves | programs / ({MULTIPROCESSORS} multiprocessors x resident) |
| fill | (programs / {MULTIPROCESSORS}) / ceil(programs / {MULTIPROCESSORS}): the part of the multiprocessors' time \
that has work, all programs taken to be equally long. Residents of a multiprocessor share its matrix units, so they \
are not in it |
| matrix instructions | its FLOPs / those of its widest matrix instruction, whose m x n x k is named |

**Estimate** = sum over the kernels of max(bytes / bandwidth, FLOPs / (rate x fill)) + {{launch_us:g}} us a kernel. A \
kernel's bytes are those of the tensors that it takes and returns, each once; a workload's only kernel has the \
workload's. An op's FLOPs, less those of library kernels in it, belong in equal parts to its launches with matrix \
instructions. A library's kernel fills the GPU. The {{launch_us:g}} us are an assumption: a launch's latency and the \
drain of the one before, on the device; the host is not in it.

The estimate is blind to:
- the caches: what a kernel hands to the next through L2 (50 MB) is counted as memory traffic, and so is all of a \
tensor of which a few rows are read, which estimates too high; tiles that are read again from memory are not counted, \
which estimates too low;
- latency within a program: loads, softmax and epilogues that matrix instructions wait for, and how many warps hide it;
- products that a kernel computes anew, such as the scores in the attention's backward; ragged lengths inside \
composites, whose attention is counted at the longest;
- grids and splits of libraries, and the clock under load.

A measurement is of the kernels of the commit in brackets, an estimate of this page's.
"""


def text(
    works: Sequence[Work],
    found: Mapping[Launch, Compiled],
    devices: Devices,
    launch_s: float,
    made: str,
) -> str:
    """Write the page, in Markdown.

    Args:
        works: of all workloads, an op's side by side.
        found: every launch compiled.
        devices: what was measured on each.
        launch_s: of a kernel.
        made: by what, in Markdown.
    """
    lines = [
        "# Estimates",
        "",
        made,
        "",
        INTRODUCTION.format(launch_us=1e6 * launch_s),
        *_ceilings(works, found, devices, launch_s),
    ]
    for op in dict.fromkeys(work.workload.op for work in works):
        mine = [work for work in works if work.workload.op == op]
        lines += ["", f"## `{op}`", "", *tables(mine, found, devices, launch_s)]
    return "\n".join(lines) + "\n"


def tables(
    works: Sequence[Work],
    found: Mapping[Launch, Compiled],
    devices: Devices,
    launch_s: float,
) -> list[str]:
    """Return the lines of one op's table: a row a workload and mode."""
    own = [
        f"{device.name.upper()} {name}" for device in devices for name in ("roofline us", "estimate us", "measured us")
    ]
    return markdown.table([*HEADER, *own], [row(work, kernels(work, found), devices, launch_s) for work in works], TEXT)


def row(
    work: Work,
    listed: Sequence[Kernel],
    devices: Devices,
    launch_s: float,
) -> list[str]:
    """Return a workload's cells."""
    own = sum(kernel.compiled is not None for kernel in listed)
    longest = max(listed, key=lambda kernel: kernel.seconds(next(iter(devices))))
    cells = [work.workload.name, work.mode, f"{work.flops / 1e9:.2f}", f"{work.nbytes / 1e6:.1f}"]
    cells += [f"{own} + {len(listed) - own}", *_kernel(longest)]
    for device, known in devices.items():
        record = known.get(work.key)
        cells += [
            f"{1e6 * device.roofline_s(work.flops, work.nbytes):.1f}",
            f"{1e6 * estimate_s(listed, device, launch_s):.1f}",
            _measured(record) if record else "",
        ]
    return cells


def _kernel(kernel: Kernel) -> list[str]:
    """Show a kernel and how it fills the GPU; of a library's only the name."""
    name, occupancy, compiled = kernel.step.name, kernel.occupancy, kernel.compiled
    if occupancy is None or compiled is None or kernel.step.launch is None:
        return [f"{name} (library)", "", "", "", "", "", ""]
    resources, warps, matrix = compiled.resources, kernel.step.launch.num_warps, compiled.matrix
    shape = "x".join(map(str, matrix)) if matrix else ""
    return [
        f"`{name}`",
        f"{resources.registers} / {resources.shared / 1024:.1f} / {warps}",
        str(occupancy.programs),
        str(occupancy.resident),
        f"{occupancy.waves:.2f}",
        f"{occupancy.fill:.2f}",
        f"{kernel.instructions:,.0f} of {shape}" if kernel.instructions else "-",
    ]


def _measured(record: Measurement) -> str:
    """Show microseconds and commit."""
    commit = str(record.environment.get("commit") or "unknown")[:SHORT]
    return f"{1e3 * (record.p50_ms or 0):.1f}{', noisy' if record.noisy else ''} ({commit})"


def _ceilings(
    works: Sequence[Work],
    found: Mapping[Launch, Compiled],
    devices: Devices,
    launch_s: float,
) -> list[str]:
    """List what each device is taken for, and how far its measurements are from the estimates."""
    lines = []
    for device, known in devices.items():
        ratios = [
            (known[work.key].p50_ms or 0) / 1e3 / estimate_s(kernels(work, found), device, launch_s)
            for work in works
            if work.key in known
        ]
        lines.append(
            f"- {device.name.upper()}: {device.bandwidth / 1e12:g} TB/s, {device.rate / 1e12:g} TFLOP/s of bf16, "
            f"{device.source}. Medians of `bench/results/{device.folder}`: "
            + (
                f"measured / estimate {min(ratios):.2f} to {max(ratios):.2f}, median {median(ratios):.2f} "
                f"(rows: {len(ratios)})."
                if ratios
                else "none yet."
            )
        )
    return lines
