"""The steps that earlier runs of ``make gpu`` did: ``gpu.json``, by which the next one goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records import environment, resume
from ..records.files import read_json, write_json
from .steps import OK, Done, Step

FILE = "gpu.json"


def identity_of(device: str) -> dict[str, Any] | None:
    """Return what must be the same for a run to go on, of this checkout on a device; None where it can't be told."""
    return resume.identity({"device": device, **environment.revision(), "versions": environment.versions()})


@dataclass
class State:
    """The steps that were run for one commit on one device.

    Attributes:
        path: of the file.
        identity: of :func:`identity_of`.
        steps: by name, how each ended last.
        note: why earlier steps don't count; "" where they do, or where there are none.
    """

    path: Path
    identity: dict[str, Any] | None
    steps: dict[str, Done] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def read(cls, folder: Path, identity: dict[str, Any] | None, *, fresh: bool) -> State:
        """Read what a folder holds of this identity; nothing of another one, or where ``fresh`` starts anew."""
        state = cls(folder / FILE, identity)
        if not state.path.exists():
            return state
        try:
            content = read_json(state.path)
            before, found = content["identity"], [Done(**one) for one in content["steps"]]
            if not isinstance(before, dict | None):
                raise ValueError(f"identity must be an object, got {before!r}")
        except (ValueError, OSError, TypeError, KeyError) as error:
            state.note = f"{state.path} can't be read: {error}"
            return state
        if fresh:
            state.note = "--fresh"
        elif identity is None:
            state.note = "the commit is unknown or files differ from it, so nobody knows what was run"
        elif before != identity:
            state.note = f"earlier steps are of another commit, device or version: {_described(before)}"
        else:
            state.steps = {done.name: done for done in found}
        return state

    def finished(self, step: Step) -> Done | None:
        """Return how a step ended that need not run again; None where it must."""
        done = self.steps.get(step.name)
        return done if done is not None and done.status == OK and not step.again else None

    def add(self, done: Done) -> None:
        """Keep how a step ended, on disk too."""
        self.steps[done.name] = done
        steps = [dataclasses.asdict(one) for one in self.steps.values()]
        write_json(self.path, {"identity": self.identity, "steps": steps})


def left_to_do(results: Iterable[Done]) -> list[str]:
    """Name the steps that a rerun goes on with."""
    return [done.name for done in results if done.is_left_to_do]


def _described(identity: dict[str, Any] | None) -> str:
    if identity is None:
        return "unknown"
    return f"{str(identity.get('commit'))[: environment.SHORT]}, {identity.get('device')}, {identity.get('versions')}"
