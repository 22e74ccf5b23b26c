"""The environment variables of the package: what each may be. Any other value is an error where it is read, and in the
report of ``python -m hia_kernels.info``."""

from __future__ import annotations

import os

BACKEND_NAMES = (
    "auto",
    "reference",
    "triton",
    "cuda",
    "cublas",
    "cudnn",
    "native",
    "cpu",
    "sdpa",
    "flash_attn",
    "xformers",
)
CPU_ISAS = ("avx512", "avx2", "none")
# the first is what an unset variable means
CHOICES: dict[str, tuple[str, ...]] = {
    "HIA_BACKEND": BACKEND_NAMES,
    "HIA_DEBUG": ("0", "1"),
    "HIA_TUNED": ("1", "0"),
    "HIA_CPU_ISA": ("", *CPU_ISAS),
}


def read(name: str) -> str:
    """The value of a variable of :data:`CHOICES`; its first choice where it is unset or empty.

    Raises:
        ValueError: it is none of its choices.
    """
    choices = CHOICES[name]
    value = os.environ.get(name) or choices[0]
    if value not in choices:
        expected = ", ".join(choice for choice in choices if choice)
        raise ValueError(f"{name} must be one of {expected}, got {value!r}")
    return value
