"""The paper's Tables 2 and 4 in small, on phantoms and a tiny frozen host: ``python -m bench ablation``."""

from __future__ import annotations

import concurrent.futures
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..cli import BadOption
from ..records.environment import describe, device_name, without_folders
from ..records.files import read_json, results_folder, write_json
from . import report
from .protocol import QUICK_PROTOCOL, ROWS, START_ROWS, Protocol, Row, row_named
from .tasks import make, run_row
from .train import MASKS, TEST, TRAIN, Material
from .workers import Submit, finish, workers

QUICK = ("full", "no-high-resolution")
LEARNT, CHANCE_LEVEL = 0.9, 0.75  # of presence: what --quick demands of the full model, and forbids without resolution


def chosen_rows(names: Iterable[str] | None, *, start: bool, quick: bool) -> list[Row]:
    """List the rows to run.

    Raises:
        BadOption: a name that no row has.
    """
    if names:
        try:
            return [row_named(name) for name in dict.fromkeys(names)]
        except ValueError as error:
            raise BadOption(str(error)) from error
    if quick:
        return [row_named(name) for name in QUICK]
    return list(START_ROWS if start else ROWS)


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
        write_json(place, Material(protocol, cache).host_scores())
    return dict(_read(place))


def _read(place: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is something else; names the file, and says what to do.
    """
    try:
        return read_json(place)
    except ValueError as error:
        raise ValueError(f"{error}; delete it") from error


def _run_of(place: Path) -> dict[str, Any] | None:
    """Read a run; None where the file holds something else."""
    run = _read(place)
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


def run(
    *,
    rows: list[str] | None,
    start: bool,
    seeds: list[int] | None,
    quick: bool,
    jobs: int | None,
    cache: Path,
    out: Path | None,
    record: bool,
) -> int:
    """Run the rows that are missing, and write tables and plot of all that are there.

    Args:
        rows: names; None takes all of the tables'.
        start: those that take the start apart instead.
        seeds: instead of the protocol's.
        quick: two rows by the smaller protocol, and a verdict.
        jobs: runs side by side; None takes one a core.
        cache: folder of what runs share.
        out: folder of runs and tables.
        record: write the tables to bench/results as well.

    Returns:
        0; 1 where a quick run did not learn; 2 where a file can't be used.
    """
    chosen, protocol = chosen_rows(rows, start=start, quick=quick), QUICK_PROTOCOL if quick else Protocol()
    seeds = list(dict.fromkeys(seeds or protocol.seeds))
    device = device_name("cpu")
    folder = out or results_folder(device) / f"ablation-{protocol.fingerprint()}"
    began = time.monotonic()
    try:
        train_missing(protocol, chosen, seeds, jobs or os.cpu_count() or 1, cache, folder, began)
        results = current_runs(folder, protocol, chosen)
        found = {"protocol": protocol.to_dict(), "host": _host_scores(protocol, cache, folder), "runs": results}
        if record:
            _check_whole(protocol, results)
        for target in (folder, *([results_folder(device, record=True)] if record else [])):
            report.write(found, target)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print((folder / "ablation.md").read_text(encoding="utf-8"))
    print(f"{len(results)} runs in {folder}, {(time.monotonic() - began) / 60:.1f} min for this call")
    return verdict(results, seeds[0]) if quick else 0


def train_missing(
    protocol: Protocol, rows: list[Row], seeds: list[int], jobs: int, cache: Path, folder: Path, began: float
) -> None:
    """Run what the folder does not have yet, ``jobs`` at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(row, seed) for seed in seeds for row in rows]  # seed by seed: a run that is cut short has whole seeds
    places = {(row.name, seed): folder / f"{row.name}-{seed}.json" for row, seed in pairs}
    missing = [(row, seed) for row, seed in pairs if not is_current(places[row.name, seed], protocol, row)]
    if not missing:
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {**describe("cpu"), "threads_a_run": threads, "jobs": jobs}
    environment["command"] = without_folders(environment["command"])
    with workers(jobs, threads) as submit:
        finish(prepare(submit, protocol, cache, rows, seeds, began))
        finish(
            [
                submit(run_row, protocol, cache, row, seed, environment, began, places[row.name, seed])
                for row, seed in missing
            ]
        )


def _check_whole(protocol: Protocol, results: list[dict[str, Any]]) -> None:
    """Demand all rows and seeds of the tables.

    Raises:
        ValueError: some are missing.
    """
    left = {(row.name, seed) for row in ROWS for seed in protocol.seeds} - {(r["row"], r["seed"]) for r in results}
    if left:
        named = ", ".join(f"{name} {seed}" for name, seed in sorted(left)[:5])
        raise ValueError(f"--record must have all rows and seeds of the tables, {len(left)} are left: {named}")


def verdict(results: list[dict[str, Any]], seed: int) -> int:
    """Judge a quick run: 0 where the full model learnt presence and the one without high resolution did not."""
    scores = {result["row"]: result["scores"]["disease"] for result in results if result["seed"] == seed}
    learnt = scores["full"] >= LEARNT and scores["no-high-resolution"] < CHANCE_LEVEL
    print(
        f"presence: full {scores['full']:.2f} (at least {LEARNT}), without high resolution "
        f"{scores['no-high-resolution']:.2f} (below {CHANCE_LEVEL}): {'passed' if learnt else 'FAILED'}"
    )
    return 0 if learnt else 1
