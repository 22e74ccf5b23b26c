"""Adapters on disk, in PEFT's file layout: adapter_config.json, adapter_model.safetensors, README.md. No pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Container
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import RUN_OPTIONS, HiAConfig
from ..layers.adapter import HiAAdapter
from ..layers.forms import present_names
from ..renamed import warn_caller

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
PEFT_TYPE = "HIA"


def save_adapter(adapter: HiAAdapter, base_model_name: str, directory: Path) -> None:
    """Write the three files; each under a temporary name, renamed when all are whole.

    Raises:
        NotADirectoryError: ``directory`` is a file.
        ValueError: parameters on the meta device have no values to save.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"hia: save_directory must be a directory, got the file {directory}")
    tensors = {name: tensor.detach().contiguous() for name, tensor in adapter.state_dict().items()}
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise ValueError(f"hia: save_pretrained needs parameters with values, got {len(empty)} on the meta device")
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base_model_name,
        "config": adapter.config.to_dict(),
    }
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
        save_file(tensors, Path(scratch) / WEIGHTS_NAME, metadata={"format": "pt"})
        (Path(scratch) / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        (Path(scratch) / CARD_NAME).write_text(_card(adapter, base_model_name))
        for name in (WEIGHTS_NAME, CARD_NAME, CONFIG_NAME):
            os.replace(Path(scratch) / name, directory / name)


def read_config(directory: Path) -> tuple[HiAConfig, dict[str, Any]]:
    """Read what the adapter's weights are, and the choices of a run that files of older versions hold beside that.

    Raises:
        FileNotFoundError: no directory or no file. ValueError: not JSON, or not of a HiA adapter.
    """
    path = _existing(directory, CONFIG_NAME)
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"hia: {path} must be JSON, got: {error}") from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
    if kind != PEFT_TYPE or not isinstance(settings.get("config"), dict):
        raise ValueError(f"hia: {path} must describe an adapter of peft_type {PEFT_TYPE}, got {kind!r}")
    fields = settings["config"]
    options = {name: fields[name] for name in RUN_OPTIONS if name in fields}
    return HiAConfig.from_dict({name: value for name, value in fields.items() if name not in options}), options


def followed_options(held: dict[str, Any], given: Container[str], directory: Path) -> dict[str, Any]:
    """Return the choices that a run follows because an old file holds them, and warn of them.

    Args:
        held: of :func:`read_config`.
        given: names of those that the caller makes, which are stronger.
        directory: of the file.

    Returns:
        The others, by the names that plans have now.
    """
    options = {name: value for name, value in held.items() if name not in given}
    if not options:
        return {}
    now = {name: present_names(value) if name == "plan" else value for name, value in options.items()}
    texts = ", ".join(
        f"{name}={value!r}" + (f", now {name}={now[name]!r}" if now[name] != value else "")
        for name, value in options.items()
    )
    calls = ", ".join(f"model.set_{name}(...)" for name in options)
    warn_caller(
        f"hia: {directory / CONFIG_NAME} is of an older version and holds {texts}, which this run follows; "
        f"choices of a run are no longer saved: give them to from_pretrained, or call {calls}"
    )
    return now


def check_host(config: HiAConfig, facts: dict[str, Any], directory: Path) -> None:
    """Raise ValueError unless the adapter was made for a host with these facts."""
    made_for = {name: getattr(config, name) for name in facts}
    if made_for != facts:
        raise ValueError(f"hia: {directory} holds an adapter made for a host with {made_for}, got a base with {facts}")


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Read the adapter's tensors.

    Raises:
        FileNotFoundError: no file. ValueError: damaged, e.g. cut off.
    """
    path = _existing(directory, WEIGHTS_NAME)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"hia: {path} must be a whole safetensors file, got: {error}; copy it again") from error


def load_adapter(adapter: HiAAdapter, tensors: dict[str, Tensor], directory: Path) -> None:
    """Copy the tensors into the adapter, all or none.

    Raises:
        ValueError: missing, extra or wrong-shaped tensors, listed.
    """
    expected = adapter.state_dict()
    problems = []
    if missing := sorted(set(expected) - set(tensors)):
        problems.append(f"missing {missing}")
    if extra := sorted(set(tensors) - set(expected)):
        problems.append(f"unexpected {extra}")
    for name in sorted(set(expected) & set(tensors)):
        if tensors[name].shape != expected[name].shape:
            problems.append(f"{name} of shape {list(tensors[name].shape)} instead of {list(expected[name].shape)}")
    if problems:
        raise ValueError(f"hia: {directory / WEIGHTS_NAME} must hold the adapter's tensors, got " + "; ".join(problems))
    on_meta = any(tensor.is_meta for tensor in expected.values())
    adapter.load_state_dict(tensors, assign=on_meta)


def _existing(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(f"hia: an adapter's directory must hold {name}, got {directory} without it")
    return path


def _card(adapter: HiAAdapter, base_model_name: str) -> str:
    config = adapter.config
    parameters = sum(parameter.numel() for parameter in adapter.parameters())
    return f"""---
library_name: hia
base_model: {base_model_name or "unknown"}
tags: [hia, adapter]
---

# HiA adapter

A high-resolution instruction-aware adapter (HiA, MICCAI 2024) for a frozen {config.host_type} host of
{config.num_hidden_layers} layers and hidden size {config.hidden_size}: {parameters:,d} parameters, encoder
`{config.encoder}`, {config.num_queries} queries of width {config.dim}, injected after decoder layers
{", ".join(map(str, config.layer_indices))}.

```python
import hia

model = hia.HiAModel.from_pretrained(base, "this directory")
```

Not a medical device: outputs are not for diagnosis.
"""
