"""Studies as files: PNG images and one JSON record a line, as a trainer reads them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from ..images.radiograph import Radiograph
from .dataset import PhantomDataset


def check_folder(folder: Path) -> None:
    """Raise unless the folder is new, or empty and nobody's working directory, in a parent that can be written to."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"hia.phantom: folder must be new or empty, got {folder}; choose another")
    if folder.resolve() == Path.cwd():
        raise FileExistsError("hia.phantom: folder must not be the working directory, which would be replaced")
    check_parent("folder", folder)


def check_parent(name: str, path: Path) -> None:
    """Raise FileNotFoundError or PermissionError unless ``path`` can be made in the folder that it lies in."""
    parent = path.resolve().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"hia.phantom: {name} must have a parent that exists, got {path}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"hia.phantom: {name} must lie where it can be written, got {path}")


def write_records(folder: str | Path, dataset: PhantomDataset, progress: Callable[[int], object] | None = None) -> Path:
    """Write a data set into a new or empty folder, whole or not at all.

    ``records.jsonl`` has one record a line: id, task, images (paths within the folder), conversations of one human
    and one gpt turn; the human's starts with one ``<image>`` for each. Images are grey PNG files of the pixels as they
    are, 8 bits for 8-bit studies, else 16 with values below 2**bits.

    Args:
        folder: made by this call; its parent must exist.
        dataset: what to write.
        progress: is given the number of items written, after each.

    Returns:
        The path of ``records.jsonl``.

    Raises:
        FileExistsError: the folder holds something, is a file, or the working directory. FileNotFoundError: no
            parent. PermissionError: one that can't be written.
    """
    folder = Path(folder)
    check_folder(folder)
    folder = folder.resolve()  # a link's target, which stays one
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"  # beside it, so that the rename is one step
    try:
        (partial / "images").mkdir(parents=True)
        with (partial / "records.jsonl").open("w", encoding="utf-8", newline="\n") as lines:
            for index in range(len(dataset)):
                lines.write(json.dumps(_write_item(partial, dataset, index), ensure_ascii=False) + "\n")
                if progress is not None:
                    progress(index + 1)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / "records.jsonl"


def _write_item(folder: Path, dataset: PhantomDataset, index: int) -> dict[str, Any]:
    sample = dataset[index]
    name = f"phantom-{index:06d}"
    images = [f"images/{name}-{number}.png" for number in range(1, len(sample.images) + 1)]
    for path, radiograph in zip(images, sample.images):
        save_png(folder / path, radiograph)
    question = sample.question
    human = "<image>" * len(images) + "\n" + question.text
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": question.answer}]
    return {"id": name, "task": question.task, "images": images, "conversations": turns}


def save_png(path: Path, radiograph: Radiograph) -> None:
    """Save grey pixels [H, W, 1], uint8 or uint16, as they are; the window is not kept."""
    Image.fromarray(radiograph.pixels[..., 0].numpy()).save(path)
