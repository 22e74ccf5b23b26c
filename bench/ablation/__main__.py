"""``python -m bench ablation``: the paper's Tables 2 and 4 in small, on phantoms and a tiny frozen host."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.environment import REPOSITORY, describe, device_name, slug

from . import report
from .protocol import ROWS, START_ROWS, Protocol, Row, row_named
from .train import TEST, TRAIN, Material, run

CACHE = REPOSITORY / "build" / "ablation"
QUICK = ("full", "no-high-resolution")
LEARNT, CHANCE_LEVEL = 0.9, 0.75  # of presence: what --quick demands of the full model, and forbids without resolution


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench ablation",
        description="Train adapters that differ in one thing on phantoms whose lesions the host's view loses, and "
        "score them on held-out ones. Host and pre-trained encoder are made once and kept in --cache. The protocol "
        "stands in bench/ablation/protocol.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = ", ".join(row.name for row in (*ROWS, *START_ROWS))
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"some of: {names}; default: all of the tables'")
    parser.add_argument("--start", action="store_true", help="the rows that take the start's parts apart instead")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="instead of the protocol's")
    parser.add_argument("--quick", action="store_true", help="full and without high resolution, one seed; fails unless "
                        f"the full model tells presence in {LEARNT:.0%} and the other one doesn't")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of host, encoder and phantoms")
    parser.add_argument("--out", type=Path, help="folder of runs, tables and plot; default: build/ablation/<protocol>")
    parser.add_argument("--record", action="store_true", help="write to bench/results/<device> as well")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    return options


def chosen_rows(options: argparse.Namespace) -> list[Row]:
    """List the rows to run."""
    if options.rows:
        return [row_named(name) for name in options.rows]
    if options.quick:
        return [row_named(name) for name in QUICK]
    return list(START_ROWS if options.start else ROWS)


def _say(start: float, who: str, text: str) -> None:
    print(f"[{(time.monotonic() - start) / 60:5.1f} min] {who}: {text}", flush=True)


def _one(
    protocol: Protocol, cache: Path, row: Row, seed: int, threads: int, start: float, place: Path
) -> dict[str, Any]:
    """Run in a process of its own; the result is on disk as soon as it is there."""
    torch.set_num_threads(threads)
    result = run(Material(protocol, cache), row, seed, lambda text: _say(start, f"{row.name} {seed}", text))
    scratch = place.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(place)
    return result


def prepare(protocol: Protocol, options: argparse.Namespace, rows: list[Row], seeds: list[int], start: float) -> None:
    """Make what runs share before they start side by side."""
    material, tasks = Material(protocol, options.cache), len(protocol.tasks)

    def tell(text: str) -> None:
        _say(start, "prepare", text)

    material.host(tell)
    for low in sorted({row.low_resolution for row in rows}):
        material.encoder_state(low, tell)
    for seed in seeds:
        material.batches(TRAIN, protocol.train_samples, seed, tell)
    material.batches(TEST, protocol.test_samples * tasks, 0, tell)


def main(argv: list[str] | None = None) -> int:
    """Run the rows that are missing, and write tables and plot of all that are there."""
    options = arguments(argv)
    try:
        rows = chosen_rows(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    protocol, start = Protocol(), time.monotonic()
    seeds = options.seeds or [*protocol.seeds[: 1 if options.quick else None]]
    folder = options.out or CACHE / f"runs-{protocol.fingerprint()}"
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(row, seed) for seed in seeds for row in rows]  # seed by seed: a run that is cut short has whole seeds
    places = {(row.name, seed): folder / f"{row.name}-{seed}.json" for row, seed in pairs}
    missing = [(row, seed) for row, seed in pairs if not places[row.name, seed].is_file()]
    if missing:
        prepare(protocol, options, rows, seeds, start)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        waiting = [
            pool.submit(_one, protocol, options.cache, row, seed, threads, start, places[row.name, seed])
            for row, seed in missing
        ]
        for done in concurrent.futures.as_completed(waiting):
            done.result()
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))]
    environment = {**describe("cpu", "bench"), "threads_a_run": threads, "jobs": options.jobs}
    record = {"protocol": protocol.to_dict(), "environment": environment, "runs": results}
    targets = [folder] + ([REPOSITORY / "bench" / "results" / slug(device_name("cpu"))] if options.record else [])
    for target in targets:
        report.write(record, target)
    print((folder / "ablation.md").read_text())
    print(f"{len(results)} runs in {folder}, {(time.monotonic() - start) / 60:.1f} min for this call")
    return verdict(results) if options.quick else 0


def verdict(results: list[dict[str, Any]]) -> int:
    """Judge a quick run: 0 where the full model learnt presence and the one without high resolution did not."""
    scores = {result["row"]: result["scores"]["disease"] for result in results if result["seed"] == 0}
    learnt = scores["full"] >= LEARNT and scores["no-high-resolution"] < CHANCE_LEVEL
    print(
        f"presence: full {scores['full']:.2f} (at least {LEARNT}), without high resolution "
        f"{scores['no-high-resolution']:.2f} (below {CHANCE_LEVEL}): {'passed' if learnt else 'FAILED'}"
    )
    return 0 if learnt else 1


if __name__ == "__main__":
    sys.exit(main())
