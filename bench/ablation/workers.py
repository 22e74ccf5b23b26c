"""A pool of processes, none of which outlives the command. It imports little: every process starts with this."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

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
