"""Old names of methods, which work with a warning for one version."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

GONE_IN = "0.2"


def warn_caller(message: str) -> None:
    """Give a FutureWarning at the line outside this package that led here, however deep inside it is found."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and (frame.f_globals.get("__name__") or "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, FutureWarning, stacklevel=level)


def renamed(old: str, new: str) -> Callable[..., Any]:
    """Make a method that warns and calls another one.

    Args:
        old: the method's own name.
        new: the name of the method that it calls.
    """

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        warn_caller(
            f"hia: {type(self).__name__}.{old}() is called {new}() now; the old name goes with version {GONE_IN}"
        )
        return getattr(self, new)(*args, **kwargs)

    method.__name__ = old
    method.__doc__ = f"Call :meth:`{new}`, with a FutureWarning: this old name goes with version {GONE_IN}."
    return method
