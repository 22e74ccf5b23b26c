"""Run what reaches csrc/ under AddressSanitizer and UndefinedBehaviorSanitizer, with new memory full of NaN.

First, broken functions compiled the same way must be reported, each in a process of its own: a campaign that finds
nothing counts only if it can find something. Then the tests of the native kernels, and random calls by the native
backend with each set of instructions that the processor has.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.sanitize import build
from tests.sanitize.build import CannotSanitize

TESTS = (
    "tests/ops/test_conv_norm_act_native.py",
    "tests/ops/test_stem_native.py",
    "tests/ops/test_products.py",
    "tests/ops/test_linear.py",
    "tests/ops/test_head_linear.py",
    "tests/ops/test_latent_attention.py",
    "tests/ops/test_zero_sizes.py",
    "tests/ops/test_not_finite.py",
    "tests/ops/test_fresh.py",
)
# a compiler of generated code under the sanitizers tests the compiler
LEFT_OUT = "not compile and not export and not opcheck and not gradcheck and not fullgraph"
CONTROLS = {  # what each broken function must be reported as; "" stands for a NaN that it returns
    "read_behind": r"AddressSanitizer: heap-buffer-overflow[\s\S]*READ of size 4",
    "write_behind": r"AddressSanitizer: heap-buffer-overflow[\s\S]*WRITE of size 4",
    "read_freed": r"AddressSanitizer: heap-use-after-free",
    "shift_too_far": r"runtime error: shift exponent \d+ is too large",
    "overflow": r"runtime error: signed integer overflow",
    "read_unwritten": "",
}
CONTROL = """
import sys, torch
torch.ops.load_library(sys.argv[1])
found = getattr(torch.ops.hia_broken, sys.argv[2])(torch.ones(5))
assert torch.empty(1000).isnan().all(), "PyTorch's new memory is not NaN"
print("returned", found)
"""
REPORT = r"ERROR: AddressSanitizer|AddressSanitizer: CHECK failed|runtime error: "
ISAS = ("avx512", "avx2")


@dataclass(frozen=True)
class Part:
    """One run under the sanitizers.

    Attributes:
        name: for people.
        figures: what it counted.
        reports: of the sanitizers.
        code: its exit code.
    """

    name: str
    figures: str
    reports: int
    code: int


def control(command: list[str]) -> list[str]:
    """Run the broken functions and say which are not reported."""
    problems = []
    for name, pattern in CONTROLS.items():
        reports = build.REPORTS / f"control-{name}"
        done = subprocess.run(
            [sys.executable, "-c", CONTROL, str(build.BROKEN), name],
            env=build.sanitized(command, reports),
            cwd=build.TREE,
            capture_output=True,
            text=True,
        )
        text = "".join(path.read_text("utf-8", "replace") for path in build.REPORTS.glob(f"{reports.name}.*"))
        found = re.search(pattern, text) if pattern else "returned nan" in done.stdout
        print(f"  {name:<16} {'reported' if found else 'NOT REPORTED'}", flush=True)
        if not found:
            problems.append(f"{name}: {(text + done.stdout + done.stderr)[-1500:]}")
    return problems


def run(name: str, arguments: Sequence[str], variables: dict[str, str], figures: str) -> Part:
    """Run Python in the copy, pass on what it prints, and count reports.

    Args:
        name: of the part.
        arguments: of Python.
        variables: its environment.
        figures: a pattern; the last line that has it says what was counted.
    """
    print(f"== {name}", flush=True)
    lines = []
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=build.TREE,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout:
            if line.strip():
                print(f"{name}: {line}", end="", flush=True)
                lines.append(line.strip(" =\n"))
    counted = next((line for line in reversed(lines) if re.search(figures, line)), "nothing was counted")
    return Part(name, counted, show_reports(name), process.returncode)


def show_reports(name: str) -> int:
    """Print and count the reports of a part."""
    count = 0
    for path in sorted(build.REPORTS.glob(f"{slug(name)}.*")):
        text = path.read_text("utf-8", "replace")
        found = len(re.findall(REPORT, text))
        count += found
        if found:
            print(f"\n{path}:\n{text[:6000]}", flush=True)
    return count


def slug(name: str) -> str:
    """Return a name for files."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def isas() -> list[str]:
    """List the sets of instructions that the kernels have and this processor takes."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    found = {"avx512": "avx512f" in flags, "avx2": " avx2" in flags}
    return [name for name in ISAS if found[name]]


def parts(command: list[str], options: argparse.Namespace) -> list[Part]:
    """Run the campaign: the tests in processes of their own, as pytest-xdist's don't start under the sanitizers."""

    def variables(name: str, **more: str) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": "2"}  # the kernels split their work
        return build.sanitized(command, build.REPORTS / slug(name)) | threads | more

    def test(share: int) -> Part:
        name = f"tests {share + 1}"
        files = TESTS[share :: options.workers]
        arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", LEFT_OUT, *files]
        return run(name, arguments, variables(name), r"\d+ passed|\d+ failed|no tests")

    found: list[Part] = []
    if options.tests:
        with ThreadPoolExecutor(options.workers) as pool:
            found += pool.map(test, range(min(options.workers, len(TESTS))))
    for isa in isas():
        name = f"random calls, {isa}"
        flags = ["--backend", "native", "--cases", str(options.cases), "--workers", str(options.workers)]
        flags += [] if options.seed is None else ["--seed", str(options.seed)]
        found.append(run(name, ["-m", "tests.fuzz", *flags], variables(name, HIA_CPU_ISA=isa), r"^all  "))
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.sanitize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 nothing reported, 1 a report or a failure, 2 the control was not reported or there is no"
        " compiler with sanitizers",
    )
    parser.add_argument(
        "--cases", type=int, default=1000, metavar="N", help="random calls for each set of instructions"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the random calls (default: another every time)")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="leave the tests out")
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="processes (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, prove that faults are reported, run, and count."""
    options, started = parse(arguments), time.monotonic()
    try:
        command = build.compiler()
        build.REPORTS.mkdir(parents=True, exist_ok=True)
        for path in build.REPORTS.iterdir():
            path.unlink()
        print("== compiling csrc/ with -fsanitize=address,undefined", flush=True)
        build.copy_tree()
        build.compile_all(command)
    except CannotSanitize as error:
        print(f"make test-sanitize: {error}", file=sys.stderr)
        return 2
    print("== control: broken functions must be reported", flush=True)
    problems = control(command)
    if problems:
        print("\n".join(["make test-sanitize: a fault was not reported, so nothing would be:", *problems]))
        return 2
    found = parts(command, options)
    print(f"\ncontrol: {len(CONTROLS)} of {len(CONTROLS)} broken functions reported")
    for part in found:
        print(f"{part.name}: {part.figures}; exit code {part.code}; {part.reports} reports")
    reports = sum(part.reports for part in found)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes, {reports} reports of the sanitizers", flush=True)
    return 1 if reports or any(part.code for part in found) else 0


if __name__ == "__main__":
    sys.exit(main())
