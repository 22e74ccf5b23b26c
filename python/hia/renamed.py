"""Old names of methods, which work with a warning for one version."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

GONE_IN = "0.2"


def renamed(old: str, new: str) -> Callable[..., Any]:
    """Make a method that warns and calls another one.

    Args:
        old: the method's own name.
        new: the name of the method that it calls.
    """

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            f"hia: {type(self).__name__}.{old}() is called {new}() now; the old name goes with version {GONE_IN}",
            FutureWarning,
            stacklevel=2,
        )
        return getattr(self, new)(*args, **kwargs)

    method.__name__ = old
    method.__doc__ = f"Call :meth:`{new}`, with a FutureWarning: this old name goes with version {GONE_IN}."
    return method
