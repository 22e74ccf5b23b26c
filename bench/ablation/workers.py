"""Runs side by side in processes of their own, none of which outlives the command."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..records.files import write_json
from .protocol import Protocol, Row
from .train import Material, run

Submit = Callable[..., "concurrent.futures.Future[None]"]


def _start_worker(parent: int, threads: int) -> None:
    """Leave Ctrl-C to the parent, and go when it has gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _stop(_signal: int, _frame: Any) -> None:
    raise SystemExit(143)


@contextmanager
def workers(jobs: int, threads: int) -> Iterator[Submit]:
    """Open a pool; at an error, Ctrl-C or SIGTERM its processes are ended at once.

    Args:
        jobs: processes.
        threads: of each.

    Yields:
        A function that submits a call.
    """
    context = multiprocessing.get_context("spawn")
    before = signal.signal(signal.SIGTERM, _stop)
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start_worker, initargs=(os.getpid(), threads)
    )
    try:
        yield pool.submit
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def finish(waiting: list[concurrent.futures.Future[None]]) -> None:
    """Wait for all; the first that failed raises."""
    for done in concurrent.futures.as_completed(waiting):
        done.result()


def say(start: float, who: str, text: str) -> None:
    """Print a line of progress with the minutes since ``start``."""
    print(f"[{(time.monotonic() - start) / 60:5.1f} min] {who}: {text}", flush=True)


def run_row(
    protocol: Protocol, cache: Path, row: Row, seed: int, environment: dict[str, Any], start: float, place: Path
) -> None:
    """Run one row with one seed; the result is on disk as soon as it is there."""
    result = run(Material(protocol, cache), row, seed, lambda text: say(start, f"{row.name} {seed}", text))
    write_json(place, {**result, "environment": environment})


def make(protocol: Protocol, cache: Path, what: str, arguments: tuple[Any, ...], start: float) -> None:
    """Make one thing that runs share."""
    getattr(Material(protocol, cache), what)(*arguments, lambda text: say(start, "prepare", text))
