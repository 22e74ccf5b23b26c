"""The environment variables of the package: what each may be.

Any other value is an error where it is read, and in the report of ``python -m hia_kernels.info``. Case and surrounding
blanks don't count, and an empty variable is an unset one. What ``HIA_BACKEND`` may be follows from the ops' tables:
:func:`hia_kernels.core.backend.backend_names`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

CPU_ISAS = ("avx512", "avx2", "none")
# the first is what an unset variable means
CHOICES: dict[str, tuple[str, ...]] = {
    "HIA_DEBUG": ("0", "1"),
    "HIA_TUNED": ("1", "0"),
    "HIA_CPU_ISA": ("", *CPU_ISAS),
}


def normalised(value: str) -> str:
    """Return a choice as the tables and :data:`CHOICES` spell it, were it any."""
    return value.strip().lower()


def read(name: str, choices: Sequence[str] | None = None) -> str:
    """Return the value of a variable; its first choice where it is unset or empty.

    Args:
        name: of the variable.
        choices: what it may be; None takes those of :data:`CHOICES`.

    Raises:
        ValueError: it is none of its choices.
    """
    choices = CHOICES[name] if choices is None else choices
    given = os.environ.get(name)
    if not given:
        return choices[0]
    value = normalised(given) or choices[0]
    if value not in choices:
        expected = ", ".join(choice for choice in choices if choice)
        raise ValueError(f"{name} must be one of {expected}, got {given!r}")
    return value
