"""``python -m bench ablation``: the paper's Tables 2 and 4 in small, on phantoms and a tiny frozen host."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.environment import REPOSITORY, describe, device_name, slug

from . import report
from .protocol import QUICK_PROTOCOL, ROWS, START_ROWS, Protocol, Row, row_named
from .train import MASKS, TEST, TRAIN, Material, run

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
    quick = "full and without high resolution, one seed, by a smaller protocol: five minutes; fails unless "
    quick += f"the full model tells presence in {LEARNT:.0%} and the other one doesn't"
    parser.add_argument("--quick", action="store_true", help=quick.replace("%", "%%"))
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
    protocol: Protocol, cache: Path, row: Row, seed: int, environment: dict[str, Any], start: float, place: Path
) -> None:
    """Run in a process of its own; the result is on disk as soon as it is there."""
    torch.set_num_threads(environment["threads_a_run"])
    result = run(Material(protocol, cache), row, seed, lambda text: _say(start, f"{row.name} {seed}", text))
    result["environment"] = environment
    scratch = place.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(place)


def _make(protocol: Protocol, cache: Path, what: str, arguments: tuple[Any, ...], threads: int, start: float) -> None:
    """Make one thing that runs share, in a process of its own."""
    torch.set_num_threads(threads)
    material = Material(protocol, cache)
    getattr(material, what)(*arguments, lambda text: _say(start, "prepare", text))


def prepare(submit: Callable[..., Any], protocol: Protocol, rows: list[Row], seeds: list[int]) -> list[Any]:
    """Submit what runs share: host, encoders, phantoms; only what is not there takes time."""
    count = protocol.train_samples
    waiting = [submit("host", ()), submit("batches", (MASKS, count, 0))]
    waiting += [submit("batches", (TEST, protocol.test_samples * len(protocol.tasks), 0))]
    waiting += [submit("batches", (TRAIN, count, seed)) for seed in seeds]
    waiting[1].result()  # the encoders learn from those
    return waiting + [submit("encoder_state", (low,)) for low in sorted({row.low_resolution for row in rows})]


def _host_scores(protocol: Protocol, cache: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Score the bare host once: on large lesions, which it was taught, and on small ones."""
    place = folder / "host.json"
    if not place.is_file():
        place.write_text(json.dumps(Material(protocol, cache).host_scores(), indent=1) + "\n")
    return json.loads(place.read_text())


def _finish(waiting: list[Any]) -> None:
    for done in concurrent.futures.as_completed(waiting):
        done.result()


def main(argv: list[str] | None = None) -> int:
    """Run the rows that are missing, and write tables and plot of all that are there."""
    options = arguments(argv)
    try:
        rows = chosen_rows(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    protocol, start = QUICK_PROTOCOL if options.quick else Protocol(), time.monotonic()
    seeds = options.seeds or [*protocol.seeds[: 1 if options.quick else None]]
    folder = options.out or CACHE / f"runs-{protocol.fingerprint()}"
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(row, seed) for seed in seeds for row in rows]  # seed by seed: a run that is cut short has whole seeds
    places = {(row.name, seed): folder / f"{row.name}-{seed}.json" for row, seed in pairs}
    missing = [(row, seed) for row, seed in pairs if not places[row.name, seed].is_file()]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    environment = {**describe("cpu", "bench ablation"), "threads_a_run": threads, "jobs": options.jobs}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:

        def submit(what: str, arguments: tuple[Any, ...]) -> Any:
            return pool.submit(_make, protocol, options.cache, what, arguments, threads, start)

        _finish(prepare(submit, protocol, rows, seeds) if missing else [])
        _finish([
            pool.submit(_one, protocol, options.cache, row, seed, environment, start, places[row.name, seed])
            for row, seed in missing
        ])  # fmt: skip
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))]
    record = {"protocol": protocol.to_dict(), "host": _host_scores(protocol, options.cache, folder), "runs": results}
    targets = [folder] + ([REPOSITORY / "bench" / "results" / slug(device_name("cpu"))] if options.record else [])
    for target in targets:
        report.write(record, target)
    print((folder / "ablation.md").read_text())
    print(f"{len(results)} runs in {folder}, {(time.monotonic() - start) / 60:.1f} min for this call")
    return verdict(results) if options.quick else 0


def verdict(results: list[dict[str, Any]]) -> int:
    """Judge a quick run: 0 where the full model learnt presence and the one without high resolution did not."""
    seed = min(result["seed"] for result in results)
    scores = {result["row"]: result["scores"]["disease"] for result in results if result["seed"] == seed}
    learnt = scores["full"] >= LEARNT and scores["no-high-resolution"] < CHANCE_LEVEL
    print(
        f"presence: full {scores['full']:.2f} (at least {LEARNT}), without high resolution "
        f"{scores['no-high-resolution']:.2f} (below {CHANCE_LEVEL}): {'passed' if learnt else 'FAILED'}"
    )
    return 0 if learnt else 1
