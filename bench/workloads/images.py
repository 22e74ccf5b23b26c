"""The images that runs look at: real radiographs when there are any, else phantoms drawn on the spot."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png")
PROMPT = "请比较这两次检查的X光片，说明病灶的位置、大小以及治疗前后的变化。"


def data_folder() -> Path:
    """Find real inputs: the folder ``HIA_TEST_DATA`` names, else ``../shared/data`` beside the checkout."""
    named = os.environ.get("HIA_TEST_DATA")
    return Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "data"


def _shown(folder: Path) -> str:
    """Return a path as seen from the checkout, so that a record says nothing about the machine around it."""
    return os.path.relpath(folder, Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class ImageSource:
    """Images, and where they come from.

    Attributes:
        kind: "radiographs" or "phantoms".
        paths: files, in the order they are used; empty for phantoms.
        note: one line for the output.
    """

    kind: str
    paths: tuple[Path, ...]
    note: str

    def names(self, count: int) -> list[str]:
        """List the file names of the first ``count`` images; empty for phantoms."""
        return [self.paths[number % len(self.paths)].name for number in range(count)] if self.paths else []

    def load(self, count: int, size: int) -> list[Tensor]:
        """Load ``count`` images, cropped to a square and resized: [size, size, 1] uint8."""
        if not self.paths:
            return [phantom(size, seed) for seed in range(count)]
        return [_read(self.paths[number % len(self.paths)], size) for number in range(count)]


def find_images(folder: str | Path | None) -> ImageSource:
    """Find the images of ``folder``; None means the data folder's, or phantoms where it is absent.

    Raises:
        ValueError: a folder was named and holds no image.
    """
    where = Path(folder) if folder is not None else data_folder() / "images"
    paths = tuple(sorted(path for path in where.glob("*") if path.suffix.lower() in SUFFIXES))
    if paths:
        # studies of one patient side by side first: that is what the prompt asks to compare
        paths = tuple(sorted(paths, key=lambda path: (not path.name.startswith("chest"), path.name)))
        return ImageSource("radiographs", paths, f"{len(paths)} real radiographs from {_shown(where)}")
    if folder is not None:
        raise ValueError(f"--images: must be a folder with {', '.join(SUFFIXES)} files, got {where}")
    return ImageSource("phantoms", (), f"generated phantoms: {_shown(where)} has no radiographs")


def _read(path: Path, size: int) -> Tensor:
    with Image.open(path) as image:
        grey = image.convert("L")
    side = min(grey.size)
    left, top = (grey.width - side) // 2, (grey.height - side) // 2
    square = grey.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(square).copy())[..., None]


def phantom(size: int, seed: int) -> Tensor:
    """Draw [size, size, 1] uint8: bright ellipses on a gradient, with quantum noise; no anatomy."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    picture = 60 + 60 * y
    for _ in range(12):
        centre_x, centre_y, width, height = rng.uniform((0.1, 0.1, 0.03, 0.03), (0.9, 0.9, 0.3, 0.3))
        inside = ((x - centre_x) / width) ** 2 + ((y - centre_y) / height) ** 2 < 1
        picture = picture + inside * rng.uniform(-25, 40)
    noisy = rng.normal(picture, 4)
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))[..., None]


@dataclass(frozen=True)
class PromptText:
    """Token ids of a prompt.

    Attributes:
        ids: exactly as many as asked for; the prompt is repeated to fill them.
        tokenizer: what made them.
    """

    ids: tuple[int, ...]
    tokenizer: str


def prompt_text(tokens: int, vocab_size: int) -> PromptText:
    """Return a comparison question of ``tokens`` tokens, by LLaMA-2's tokenizer where the data folder has it."""
    model_file = data_folder() / "tokenizer" / "llama-2" / "tokenizer.model"
    ids, name = _sentencepiece(model_file)
    if ids is None:
        # bytes behind the three special ids, as LLaMA's byte fallback has them
        ids, name = [3 + byte for byte in PROMPT.encode()], f"bytes ({name})"
    ids = [token % vocab_size for token in ids]
    return PromptText(tuple((ids * (tokens // len(ids) + 1))[:tokens]), name)


def _sentencepiece(model_file: Path) -> tuple[list[int] | None, str]:
    if not model_file.is_file():
        return None, "no LLaMA-2 tokenizer in the data folder"
    try:
        import sentencepiece
    except ImportError:
        return None, "sentencepiece is not installed"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    return [processor.bos_id(), *processor.encode(PROMPT)], "LLaMA-2 (sentencepiece)"
