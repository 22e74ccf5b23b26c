"""Refuses to import without the packages of the extra ``[hia]``, by a sentence that names them."""

from __future__ import annotations

from importlib.util import find_spec

REQUIRED = {"transformers": "transformers", "safetensors": "safetensors", "numpy": "numpy", "PIL": "pillow"}

_missing = [module for module in REQUIRED if find_spec(module) is None]
if _missing:
    names = ", ".join(REQUIRED[module] for module in _missing)
    raise ModuleNotFoundError(
        f"hia needs {', '.join(REQUIRED.values())}, got an environment without {names}; "
        "pip install 'hia-kernels[hia]' (hia_kernels alone needs torch alone)",
        name=_missing[0],
    )
