"""Call every op at random by every backend that runs here, and compare with its reference.

Drawn are sizes from 0, memory layouts, dtypes, values from denormal to NaN, options, and which gradients are asked
for; one call in seven is wrong and must raise an error of ours. A fault is made as small as it gets and printed as a
program. In Triton's interpreter there are fewer cases, which are small.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.campaign import INTERPRETED, PLAIN, Calls, Campaign, calls_here, plan, table

INTERRUPTED = 130  # as shells have it


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 no fault, 1 a fault, 2 a wrong option, 130 interrupted",
    )
    parser.add_argument("--cases", type=int, default=10_000, metavar="N", help="calls in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, metavar="N", help="of a campaign that is to be repeated (default: another)")
    parser.add_argument("--op", nargs="+", metavar="NAME", help="ops or functions (default: all)")
    parser.add_argument("--backend", nargs="+", metavar="NAME", help="of backends, auto included (default: all)")
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="processes (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    for name in ("cases", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: must be at least 1, got {getattr(options, name)}")
    return options


def chosen(calls: dict[str, Calls], options: argparse.Namespace) -> dict[str, Calls]:
    """Return the calls that the flags choose.

    Raises:
        SystemExit: there are none, or a name is unknown.
    """
    from tests.fuzz.subjects import SUBJECTS

    names = {SUBJECTS[function].op for function in SUBJECTS} | set(SUBJECTS)
    everything = [call for of_kind in calls.values() for call in of_kind]
    for flag, given, known in (
        ("--op", options.op, names),
        ("--backend", options.backend, {backend for _, backend in everything}),
    ):
        unknown = sorted(set(given or ()) - known)
        if unknown:
            raise SystemExit(f"python -m tests.fuzz: {flag}: must be among {', '.join(sorted(known))}, got {unknown}")

    def wanted(function: str, backend: str) -> bool:
        by_op = not options.op or function in options.op or SUBJECTS[function].op in options.op
        return by_op and (not options.backend or backend in options.backend)

    found = {kind: [call for call in of_kind if wanted(*call)] for kind, of_kind in calls.items()}
    if not any(found.values()):
        raise SystemExit(f"python -m tests.fuzz: no backend of {options.op} is among {options.backend}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign."""
    options = parse(arguments)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    print(f"seed {seed}: again with --seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="hia-fuzz-") as folder:
        calls = chosen(calls_here(Path(folder)), options)
    if importlib.util.find_spec("triton") is None:
        print("NO TRITON: its kernels are not fuzzed", flush=True)
    jobs = plan(calls, options.cases, seed)
    counted = {kind: sum(job.cases for of, job in jobs if of == kind) for kind in (PLAIN, INTERPRETED)}
    print(f"{counted[PLAIN]} cases, and {counted[INTERPRETED]} in Triton's interpreter", flush=True)
    campaign, started = Campaign(options.workers, jobs), time.monotonic()
    try:
        campaign.run()
    except KeyboardInterrupt:
        print(f"\n{table(campaign.outcomes)}\ninterrupted", flush=True)
        return INTERRUPTED
    minutes = (time.monotonic() - started) / 60
    print(f"\n{table(campaign.outcomes)}")
    print(f"seed {seed}, {minutes:.1f} minutes, {options.workers} processes: {campaign.faults} faults", flush=True)
    return 1 if campaign.faults else 0


if __name__ == "__main__":
    sys.exit(main())
