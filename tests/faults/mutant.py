"""A seeded fault: one line changed in one file, and the tests that must fail because of it."""

from __future__ import annotations

from dataclasses import dataclass

# The first eleven are named by the rule that this list exists for: each has at least one fault.
REQUIRED_KINDS = (
    "sign",
    "off by one at an edge",
    "dropped mask",
    "wrong dtype of a sum",
    "swapped heads",
    "lost residual",
    "stale cache",
    "wrong window",
    "hook left behind",
    "FLOPs counted twice",
    "timing without synchronisation",
)
KINDS = (
    *REQUIRED_KINDS,
    "lost part of a sum",
    "wrong index",
    "wrong dtype",
    "wrong shape",
    "wrong order",
    "silent fallback",
    "missing check",
    "lost state",
    "wrong measure",
    "loosened tolerance",
)


class StaleFault(ValueError):
    """The code that a fault changes is no longer there, or is there more than once."""


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: of the fault, words joined by hyphens.
        kind: one of :data:`KINDS`.
        file: that is changed, relative to the repository's root.
        old: what stands there, within one line.
        new: what stands there instead, within one line.
        tests: node ids of pytest, each without parameters or with all of them; one of them must fail by an assertion.
        why: what the fault would do to a user.
        after: text that occurs once in the file, where ``old`` does not: the first ``old`` behind it is changed.
        interpreter: the tests run in Triton's interpreter.
        native: the extension is built again, with the fault.
    """

    name: str
    kind: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str
    after: str = ""
    interpreter: bool = False
    native: bool = False

    def applied(self, text: str) -> str:
        """Put the fault into the file's ``text``.

        Raises:
            StaleFault: ``old``, or ``after`` where there is one, does not occur exactly once.
        """
        start, wanted = 0, self.after or self.old
        if text.count(wanted) != 1:
            raise StaleFault(
                f"{self.name}: {self.file} must hold {wanted!r} exactly once, got {text.count(wanted)} times; "
                "move the fault with the code"
            )
        if self.after:
            start = text.index(self.after) + len(self.after)
        place = text.find(self.old, start)
        if place < 0:
            raise StaleFault(
                f"{self.name}: {self.file} must hold {self.old!r} behind {self.after!r}, got none; "
                "move the fault with the code"
            )
        return text[:place] + self.new + text[place + len(self.old) :]
