"""Text with ``<image>`` placeholders and radiographs in; everything the model's forward and generate take out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..renamed import GONE_IN
from .load import load_image
from .radiograph import Radiograph

IGNORED = -100  # transformers' label of a token without loss


class HiABatch(dict):
    """Model inputs by name; ``model(**batch)``, ``model.generate(**batch)``, ``batch.input_ids``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"HiABatch has no {name!r}; it holds {sorted(self)}") from error

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> HiABatch:
        """Move what the device reads; ``image_map`` and ``instruction_index`` stay on the CPU, where they are read.

        Args:
            device: target.
            dtype: for ``pixel_values`` alone; raw pixels keep theirs.
        """
        moved = HiABatch(self)
        for name, value in self.items():
            if name == "high_res_pixels":
                moved[name] = [pixels.to(device) for pixels in value]
            elif isinstance(value, Tensor) and name not in ("image_map", "instruction_index"):
                moved[name] = value.to(device, dtype) if name == "pixel_values" else value.to(device)
        return moved


class HiAProcessor:
    """Wraps the host's processor; needs its ``tokenizer`` and ``image_processor``.

    Args:
        base_processor: a ``LlavaProcessor``.
        config: not needed any more; older versions read ``high_resolution`` off it.
        high_resolution: False shrinks the adapter's images to the host's resolution here already. A model with
            ``high_resolution=False`` does so itself, with the same result; the batch is smaller then.

    Raises:
        TypeError: no tokenizer, no image processor or no patch size.
    """

    def __init__(self, base_processor: Any, config: Any = None, *, high_resolution: bool = True):
        for name in ("tokenizer", "image_processor", "patch_size", "image_token"):
            if getattr(base_processor, name, None) is None:
                raise TypeError(
                    f"HiAProcessor: base_processor must have {name}, got {type(base_processor).__name__} without"
                )
        if config is not None:
            warnings.warn(
                f"hia: HiAProcessor takes no config any more, and the argument goes with version {GONE_IN}; "
                f"HiAProcessor(base_processor, high_resolution=...) says what it was read for",
                FutureWarning,
                stacklevel=2,
            )
        self.base_processor = base_processor
        self.high_resolution = high_resolution

    @property
    def tokenizer(self) -> Any:
        """Return the host's."""
        return self.base_processor.tokenizer

    @property
    def image_token_id(self) -> int:
        """Return the id of ``<image>``."""
        return self.tokenizer.convert_tokens_to_ids(self.base_processor.image_token)

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        answers: str | Sequence[str] | None = None,
        *,
        windows: Sequence[tuple[float, float] | None] | None = None,
        padding_side: str | None = None,
        max_length: int | None = None,
    ) -> HiABatch:
        """Build a batch.

        Args:
            text: one prompt or several, each the whole instruction as the host sees it (chat template applied),
                with one ``<image>`` per image. It ends where the answer begins.
            images: for one prompt an image or a list of them; for several a list of lists, or one flat list in
                order. Each is what :func:`hia.load_image` takes.
            answers: for training: what follows each prompt. Labels cover them and the end-of-sequence token.
            windows: one (low, high) or None per image, in order; overrides the image's own.
            padding_side: "left" or "right"; None takes the tokenizer's.
            max_length: tokens; a longer answer is cut, a longer prompt is an error.

        Returns:
            input_ids, attention_mask [B, S] int64; with images: pixel_values [n, 3, h, w] fp32 (the host's view),
            high_res_pixels (n raw [H, W, C] tensors), windows [n, 2] fp32, image_map [B, S] int64, and
            instruction_index [B] int64 (the last token of each prompt); with answers: labels [B, S] int64.

        Raises:
            ValueError: placeholder counts that differ from image counts, bad pixels, a prompt beyond
                ``max_length``. TypeError: text or images of another kind.
        """
        prompts, replies = self._checked(text, answers)
        radiographs = self._loaded(self._matched(prompts, images, isinstance(text, str)), windows)
        batch = HiABatch()
        tokens_per_image = 0
        if radiographs:
            host_images = [radiograph.to_pil() for radiograph in radiographs]
            encoded = self.base_processor.image_processor(host_images, return_tensors="pt")
            batch["pixel_values"] = encoded["pixel_values"]
            tokens_per_image = self._tokens_per_image(batch["pixel_values"])
        rows = [self._tokens(number, prompts, replies, tokens_per_image, max_length) for number in range(len(prompts))]
        self._pad(batch, rows, padding_side or self.tokenizer.padding_side, replies is not None)
        if radiographs:
            batch["image_map"] = self._image_map(batch["input_ids"], tokens_per_image)
            if not self.high_resolution:
                radiographs = [radiograph.resized(*batch["pixel_values"].shape[-2:]) for radiograph in radiographs]
            batch["high_res_pixels"] = [radiograph.pixels for radiograph in radiographs]
            batch["windows"] = torch.tensor([radiograph.window for radiograph in radiographs], dtype=torch.float32)
        return batch

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Decode several sequences with the tokenizer."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Decode a sequence with the tokenizer."""
        return self.tokenizer.decode(*args, **kwargs)

    def _checked(
        self, text: str | Sequence[str], answers: str | Sequence[str] | None
    ) -> tuple[list[str], Sequence[str] | None]:
        """Return the prompts and their answers, one each."""
        prompts = [text] if isinstance(text, str) else list(text)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("HiAProcessor: text must be a string or a list of strings, got " + _kinds(text))
        replies = [answers] if isinstance(answers, str) else answers
        if replies is not None and len(replies) != len(prompts):
            raise ValueError(f"HiAProcessor: answers must be one per text, got {len(replies)} for {len(prompts)}")
        for number, reply in enumerate(replies or ()):
            if self.base_processor.image_token in reply:
                raise ValueError(
                    f"HiAProcessor: answers must not hold {self.base_processor.image_token}, got one in answer {number}"
                )
        return prompts, replies

    def _matched(self, prompts: list[str], images: Any, single: bool) -> list[Any]:
        """List all images, after checking each prompt's placeholders against its images."""
        placeholders = [prompt.count(self.base_processor.image_token) for prompt in prompts]
        if images is None:
            images = []
        elif not isinstance(images, (list, tuple)):
            images = [images]
        nested = bool(images) and all(isinstance(entry, (list, tuple)) for entry in images)
        if single and not nested:
            images, nested = [list(images)], True
        if nested:
            if len(images) != len(prompts):
                raise ValueError(
                    f"HiAProcessor: images must hold one list per text ({len(prompts)}), got {len(images)} lists"
                )
            for sample, (expected, given) in enumerate(zip(placeholders, images, strict=True)):
                if expected != len(given):
                    raise ValueError(
                        f"HiAProcessor: images must match the placeholders: text {sample} has {expected} "
                        f"{self.base_processor.image_token}, got {len(given)} images"
                    )
            return [image for group in images for image in group]
        if sum(placeholders) != len(images):
            raise ValueError(
                f"HiAProcessor: images must match the placeholders: the texts have {sum(placeholders)} "
                f"{self.base_processor.image_token}, got {len(images)} images"
            )
        return list(images)

    def _loaded(self, images: list[Any], windows: Sequence[tuple[float, float] | None] | None) -> list[Radiograph]:
        if windows is not None and len(windows) != len(images):
            raise ValueError(f"HiAProcessor: windows must be one per image ({len(images)}), got {len(windows)}")
        chosen = windows if windows is not None else [None] * len(images)
        return [load_image(image, f"images[{i}]", window) for i, (image, window) in enumerate(zip(images, chosen))]

    def _tokens_per_image(self, pixel_values: Tensor) -> int:
        processor = self.base_processor
        height, width = pixel_values.shape[-2:]
        tokens = (height // processor.patch_size) * (width // processor.patch_size)
        tokens += getattr(processor, "num_additional_image_tokens", 0)
        return tokens - (1 if processor.vision_feature_select_strategy == "default" else 0)

    def _tokens(
        self,
        number: int,
        prompts: list[str],
        replies: Sequence[str] | None,
        tokens_per_image: int,
        max_length: int | None,
    ) -> tuple[list[int], list[int]]:
        """Tokenise prompt and answer apart, so that the prompt is the same in training and generation."""
        image_token = self.base_processor.image_token
        prompt = self.tokenizer(prompts[number].replace(image_token, image_token * max(tokens_per_image, 1)))
        ids = list(prompt["input_ids"])
        if max_length is not None and len(ids) > max_length:
            raise ValueError(f"HiAProcessor: text {number} must fit max_length {max_length}, got {len(ids)} tokens")
        if replies is None:
            return ids, []
        answer = list(self.tokenizer(replies[number], add_special_tokens=False)["input_ids"])
        answer.append(self.tokenizer.eos_token_id)
        return ids, answer if max_length is None else answer[: max_length - len(ids)]

    def _pad(self, batch: HiABatch, rows: list[tuple[list[int], list[int]]], side: str, with_labels: bool) -> None:
        if side not in ("left", "right"):
            raise ValueError(f"HiAProcessor: padding_side must be 'left' or 'right', got {side!r}")
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        pad_id = self.tokenizer.pad_token_id
        if pad_id is None:
            pad_id = self.tokenizer.eos_token_id  # masked out: any id does
        input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORED)
        instruction_index = torch.zeros(len(rows), dtype=torch.int64)
        for row, (prompt, answer) in enumerate(rows):
            used = len(prompt) + len(answer)
            start = longest - used if side == "left" else 0
            input_ids[row, start : start + used] = torch.tensor(prompt + answer, dtype=torch.int64)
            attention_mask[row, start : start + used] = 1
            labels[row, start + len(prompt) : start + used] = torch.tensor(answer, dtype=torch.int64)
            instruction_index[row] = start + len(prompt) - 1
        batch["input_ids"], batch["attention_mask"] = input_ids, attention_mask
        batch["instruction_index"] = instruction_index
        if with_labels:
            batch["labels"] = labels

    def _image_map(self, input_ids: Tensor, tokens_per_image: int) -> Tensor:
        mask = input_ids == self.image_token_id
        numbers = torch.full_like(input_ids, -1)
        numbers[mask] = torch.arange(int(mask.sum())) // tokens_per_image
        return numbers


def _kinds(text: Any) -> str:
    if isinstance(text, (list, tuple)):
        return f"[{', '.join(sorted({type(entry).__name__ for entry in text}))}]"
    return type(text).__name__
