"""``python -m bench ablation``: the paper's Tables 2 and 4 in small, on phantoms and a tiny frozen host."""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from bench.records.environment import REPOSITORY, describe, device_name, slug

from . import report
from .protocol import QUICK_PROTOCOL, ROWS, START_ROWS, Protocol, Row, row_named
from .train import MASKS, TEST, TRAIN, Material
from .workers import Submit, finish, make, read_json, run_row, workers, write_json

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
    parser.add_argument(
        "--out", type=Path, help="folder of runs, tables and plot; default: build/ablation/runs-<protocol>"
    )
    parser.add_argument("--record", action="store_true", help="write to bench/results/<device> as well")
    options = parser.parse_args(argv)
    for name in ("rows", "start", "record"):
        if options.quick and getattr(options, name):
            parser.error(f"--{name} must not be given with --quick, which has rows and a protocol of its own")
    if options.rows and options.start:
        parser.error("--rows must not be given with --start")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    return options


def chosen_rows(options: argparse.Namespace) -> list[Row]:
    """List the rows to run."""
    if options.rows:
        return [row_named(name) for name in dict.fromkeys(options.rows)]
    if options.quick:
        return [row_named(name) for name in QUICK]
    return list(START_ROWS if options.start else ROWS)


def prepare(
    submit: Submit, protocol: Protocol, cache: Path, rows: list[Row], seeds: list[int], start: float
) -> list[concurrent.futures.Future[None]]:
    """Submit what runs share: host, encoders, phantoms; only what is not there takes time."""

    def ask(what: str, *arguments: Any) -> concurrent.futures.Future[None]:
        return submit(make, protocol, cache, what, arguments, start)

    count = protocol.train_samples
    waiting = [ask("host"), ask("batches", MASKS, count, 0)]
    waiting += [ask("batches", TEST, protocol.test_samples * len(protocol.tasks), 0)]
    waiting += [ask("batches", TRAIN, count, seed) for seed in seeds]
    waiting[1].result()  # the encoders learn from those
    return waiting + [ask("encoder_state", low) for low in sorted({row.low_resolution for row in rows})]


def _host_scores(protocol: Protocol, cache: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Score the bare host once: on large lesions, which it was taught, and on small ones."""
    place = folder / f"host-{protocol.fingerprint('host', 'size', 'radius', 'tasks', 'test_samples')}.json"
    if not place.is_file():
        write_json(Material(protocol, cache).host_scores(), place)
    return read_json(place)


def _run_of(place: Path) -> dict[str, Any] | None:
    """Read a run; None where the file holds something else."""
    run = read_json(place)
    return run if isinstance(run, dict) and {"row", "protocol", "scores", "health"} <= set(run) else None


def is_current(place: Path, protocol: Protocol, row: Row) -> bool:
    """Tell whether a run is there that this protocol and this row would make again."""
    if not place.is_file():
        return False
    run = _run_of(place)
    if run is None:
        raise ValueError(f"{place} must hold a run of this command, got something else; delete it")
    return run["protocol"] == protocol.fingerprint(row=row)


def current_runs(folder: Path, protocol: Protocol, asked: list[Row]) -> list[dict[str, Any]]:
    """Read all runs of a folder that belong to the protocol as it is now; others don't share its tables."""
    rows = {row.name: row for row in (*ROWS, *START_ROWS, *asked)}
    runs = [run for path in sorted(folder.glob("*-*.json")) if (run := _run_of(path)) is not None]
    return [run for run in runs if run["row"] in rows and run["protocol"] == protocol.fingerprint(row=rows[run["row"]])]


def without_places(command: str) -> str:
    """Leave out of a command where caches and results lie: it changes no result, and is somebody's own."""
    return re.sub(r" --(cache|out)[ =]\S+", "", command)


def main(argv: list[str] | None = None) -> int:
    """Run the rows that are missing, and write tables and plot of all that are there."""
    options = arguments(argv)
    try:
        return _run(options, chosen_rows(options))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, rows: list[Row]) -> int:
    protocol, start = QUICK_PROTOCOL if options.quick else Protocol(), time.monotonic()
    seeds = list(dict.fromkeys(options.seeds or protocol.seeds))
    folder = options.out or CACHE / f"runs-{protocol.fingerprint()}"
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(row, seed) for seed in seeds for row in rows]  # seed by seed: a run that is cut short has whole seeds
    places = {(row.name, seed): folder / f"{row.name}-{seed}.json" for row, seed in pairs}
    missing = [(row, seed) for row, seed in pairs if not is_current(places[row.name, seed], protocol, row)]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    environment = {**describe("cpu", "bench ablation"), "threads_a_run": threads, "jobs": options.jobs}
    environment["command"] = without_places(environment["command"])
    if missing:
        with workers(options.jobs, threads) as submit:
            finish(prepare(submit, protocol, options.cache, rows, seeds, start))
            finish(
                [
                    submit(run_row, protocol, options.cache, row, seed, environment, start, places[row.name, seed])
                    for row, seed in missing
                ]
            )
    results = current_runs(folder, protocol, rows)
    record = {"protocol": protocol.to_dict(), "host": _host_scores(protocol, options.cache, folder), "runs": results}
    if options.record:
        left = {(row.name, seed) for row in ROWS for seed in protocol.seeds} - {(r["row"], r["seed"]) for r in results}
        if left:
            named = ", ".join(f"{name} {seed}" for name, seed in sorted(left)[:5])
            raise ValueError(f"--record must have all rows and seeds of the tables, {len(left)} are left: {named}")
    targets = [folder] + ([REPOSITORY / "bench" / "results" / slug(device_name("cpu"))] if options.record else [])
    for target in targets:
        report.write(record, target)
    print((folder / "ablation.md").read_text())
    print(f"{len(results)} runs in {folder}, {(time.monotonic() - start) / 60:.1f} min for this call")
    return verdict(results, seeds[0]) if options.quick else 0


def verdict(results: list[dict[str, Any]], seed: int) -> int:
    """Judge a quick run: 0 where the full model learnt presence and the one without high resolution did not."""
    scores = {result["row"]: result["scores"]["disease"] for result in results if result["seed"] == seed}
    learnt = scores["full"] >= LEARNT and scores["no-high-resolution"] < CHANCE_LEVEL
    print(
        f"presence: full {scores['full']:.2f} (at least {LEARNT}), without high resolution "
        f"{scores['no-high-resolution']:.2f} (below {CHANCE_LEVEL}): {'passed' if learnt else 'FAILED'}"
    )
    return 0 if learnt else 1
