"""Tasks in a process of their own: a crash, a hang or a broken device ends one of them, and no other."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import pytest

from bench.measure.worker import DeviceFailed, Failure, Inline, Isolated


class Channel:
    """Remembers what it is told."""

    def __init__(self):
        self.said, self.items = [], []

    def say(self, text, who="", seconds=None):
        self.said.append((text, who))

    def found(self, item):
        self.items.append(item)


class Session:
    """Does what a task's name says; its number tells processes apart."""

    def __init__(self, start=0):
        self.count = start

    def run(self, task, channel):
        self.count += 1
        channel.say("a step", "peer", 0.2 if task == "hang" else None)
        channel.found((self.count, os.getpid()))
        if task == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif task == "exit":
            os._exit(3)
        elif task == "break":
            raise DeviceFailed("the device failed (illegal access)")
        elif task == "bug":
            raise KeyError("a bug")
        elif task == "hang":
            time.sleep(60)


@pytest.fixture
def worker():
    found = Isolated(Session, margin_s=0.3)
    yield found
    found.close()


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("die", "its process was ended by SIGSEGV"),
        ("exit", "its process ended with exit code 3"),
        ("break", "the device failed (illegal access)"),
        ("hang", "it took more than 0 s"),
    ],
)
def test_a_failure_is_named_and_the_next_task_has_a_fresh_process(task, reason, worker):
    channel = Channel()
    assert worker.run("fine", channel) is None
    assert worker.run(task, channel) == Failure(reason, "peer")
    assert worker.run("fine", channel) is None
    counts, processes = zip(*channel.items)
    assert counts == (1, 2, 1), "what a task had found before it failed stands"
    assert processes[0] == processes[1] != processes[2] and os.getpid() not in processes


def test_a_fresh_process_takes_the_session_as_it_is_made_then(worker):
    channel = Channel()
    worker.run("fine", channel)
    worker.make = partial(Session, 10)
    worker.run("fine", channel)
    worker.run("break", channel)
    worker.run("fine", channel)
    assert [count for count, _ in channel.items] == [1, 2, 3, 11]


def test_a_bug_is_raised_with_its_traceback(worker):
    with pytest.raises(RuntimeError, match="the worker process raised\n(.|\n)*KeyError: 'a bug'"):
        worker.run("bug", Channel())
    assert worker.run("fine", Channel()) is None


def test_ctrl_c_keeps_what_was_found_and_ends_the_process(worker):
    class Interrupted(Channel):
        def found(self, item):
            super().found(item)
            if len(self.items) == 1:
                raise KeyboardInterrupt

    channel = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        worker.run("fine", channel)
    (_, process), *_rest = channel.items
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_in_this_process_a_broken_device_is_a_failure_too():
    channel, worker = Channel(), Inline(Session)
    assert worker.run("break", channel) == Failure("the device failed (illegal access)", "peer")
    assert worker.run("fine", channel) is None
    assert channel.items == [(1, os.getpid()), (1, os.getpid())]
    with pytest.raises(KeyError):
        worker.run("bug", channel)
    worker.close()
