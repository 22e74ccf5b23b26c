"""Run the tiers of the tests one after the other, and say how long each took: ``make test``.

Each tier is a pytest of its own, because what it needs is decided when the process starts: Triton's interpreter, the
instructions that the libraries may use, how many processes share the machine. Everything behind ``--`` goes to pytest.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NO_TESTS = 5  # pytest's exit code where the arguments choose none
INTERRUPTED = 130  # as shells have it
COMPILE = "tests/compile"
TARGETS_VARIABLE = "HIA_COMPILE_TARGETS"  # the other two take as long again; CI names all four
SHORT_WITH_VALUE = ("-k", "-m", "-p", "-n", "-c", "-o", "-W", "-r")
OUTCOMES = ("passed", "failed", "errors", "skipped")


@dataclass(frozen=True)
class Tier:
    """One run of pytest.

    Attributes:
        name: of the tier.
        title: for people.
        arguments: of pytest, beside the folder.
        folder: where its tests are; "" means everywhere else.
        environment: that it runs with.
        spread: whether pytest-xdist may spread it over processes; the compile tier has a pool of its own.
    """

    name: str
    title: str
    arguments: tuple[str, ...] = ()
    folder: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    spread: bool = True


TIERS = (
    Tier("cpu", "CPU: references, native and vendor kernels, adapter, benchmarks", (f"--ignore={COMPILE}",)),
    Tier(
        "compile",
        "Triton kernels compiled for GPUs that aren't there",
        folder=COMPILE,
        spread=False,
        environment={TARGETS_VARIABLE: os.environ.get(TARGETS_VARIABLE, "sm_80 sm_90")},
    ),
    Tier(
        "interpreter",
        "Triton kernels in the interpreter",
        ("-m", "interpreter", f"--ignore={COMPILE}"),
        environment={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    ),
)
# what PyTorch, oneDNN, MKL and our kernels may use; "best" is whatever the processor has
ISAS: dict[str, dict[str, str]] = {
    "best": {},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "HIA_CPU_ISA": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "HIA_CPU_ISA": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "plain": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "HIA_CPU_ISA": "none",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}


@dataclass(frozen=True)
class Ran:
    """The outcome of a tier.

    Attributes:
        tier: that ran.
        code: pytest's exit code.
        seconds: it took.
        summary: pytest's last line, without its frame.
    """

    tier: Tier
    code: int
    seconds: float
    summary: str

    @property
    def counts(self) -> dict[str, int]:
        """Count the outcomes that the summary names."""
        found = {word: int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", self.summary)}
        return {name: found.get(name, found.get(name.removesuffix("s"), 0)) for name in OUTCOMES}


def command(tier: Tier, workers: str, extra: Sequence[str]) -> list[str] | None:
    """Return the command of a tier; None where the paths among the arguments lead elsewhere.

    Args:
        tier: to run.
        workers: processes, a number or "auto": one a core. Without pytest-xdist there is one.
        extra: arguments of pytest; paths among them choose tests.
    """
    chosen = list(extra)
    if tier.folder:
        folder = (ROOT / tier.folder).resolve()
        paths = {position: path for position in range(len(extra)) if (path := _path_at(extra, position)) is not None}
        inside = [position for position, path in paths.items() if path == folder or folder in path.parents]
        if paths and not inside and not any(path in folder.parents for path in paths.values()):
            return None
        chosen = [argument for position, argument in enumerate(extra) if position not in paths or position in inside]
        chosen += [] if inside else [tier.folder]
    spread = tier.spread and workers != "1" and importlib.util.find_spec("xdist") is not None
    workers_of = ["-n", workers] if spread else []
    return [sys.executable, "-m", "pytest", *workers_of, *tier.arguments, *chosen]


def _path_at(arguments: Sequence[str], position: int) -> Path | None:
    """Return the path that pytest is to collect; None for an option, and for what follows one that takes a value."""
    argument, before = arguments[position], arguments[position - 1] if position else ""
    if argument.startswith("-") or before in SHORT_WITH_VALUE or (before.startswith("--") and "=" not in before):
        return None
    path = (ROOT / argument.partition("::")[0]).resolve()
    return path if path.exists() else None


def run(tier: Tier, isa: str, workers: str, extra: Sequence[str]) -> Ran:
    """Run a tier and pass on what it prints."""
    line = command(tier, workers, extra)
    if line is None:
        return Ran(tier, NO_TESTS, 0.0, "")
    environment = {**os.environ, **ISAS[isa], **tier.environment}
    if isa != "best":  # torch.compile's cache does not tell instructions apart, and loads code that reads out of bounds
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(ROOT / "build" / f"inductor-{isa}")
    print(f"== {tier.title}", flush=True)
    started, summary = time.monotonic(), ""
    with subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    ) as process:
        assert process.stdout is not None
        try:
            for printed in process.stdout:
                print(printed, end="", flush=True)
                summary = printed.strip(" =\n") if re.search(r"\bin [\d.]+s\b", printed) else summary
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            return Ran(tier, INTERRUPTED, time.monotonic() - started, "interrupted")
    return Ran(tier, process.returncode, time.monotonic() - started, summary)


def report(found: Sequence[Ran], isa: str) -> str:
    """Format a table of the tiers, their minutes, and what came of them."""
    lines = [f"{'tier':<12} {'minutes':>7}  result ({isa} instructions)"]
    for one in found:
        verdict = "no test chosen" if one.code == NO_TESTS else one.summary or f"stopped with exit code {one.code}"
        lines.append(f"{one.tier.name:<12} {one.seconds / 60:>7.1f}  {verdict}")
    total = {name: sum(one.counts[name] for one in found) for name in OUTCOMES}
    minutes = sum(one.seconds for one in found) / 60
    lines.append(f"{'all':<12} {minutes:>7.1f}  {', '.join(f'{total[name]} {name}' for name in OUTCOMES)}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    found = argparse.ArgumentParser(
        prog="python tests/tiers.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 all passed, 1 something failed, 5 no tier had a test to run, 130 interrupted",
    )
    names = [tier.name for tier in TIERS]
    found.add_argument(
        "--tiers", nargs="+", choices=names, default=names, metavar="TIER", help=f"of {', '.join(names)} (default: all)"
    )
    found.add_argument(
        "--isa",
        choices=list(ISAS),
        default="best",
        help="instructions that PyTorch, oneDNN, MKL and our kernels may use (default: all there are)",
    )
    found.add_argument("--workers", default="auto", metavar="N", help="processes of a tier (default: one a core)")
    found.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="of pytest, behind --")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; nothing is left out because something before it failed."""
    options = parser().parse_args(arguments)
    chosen = [tier for tier in TIERS if tier.name in options.tiers]
    found: list[Ran] = []
    for tier in chosen:
        found.append(run(tier, options.isa, options.workers, options.arguments))
        if found[-1].code == INTERRUPTED:
            break
    print(f"\n{report(found, options.isa)}", flush=True)
    if found[-1].code == INTERRUPTED:
        return INTERRUPTED
    if any(one.code not in (0, NO_TESTS) for one in found):
        return 1
    return NO_TESTS if all(one.code == NO_TESTS for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
