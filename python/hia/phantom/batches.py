"""Phantoms as batches of a model: drawn and tokenised once, put together many times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..images.processor import IGNORED, HiABatch, HiAProcessor
from .dataset import PhantomDataset
from .questions import Question

USER, ASSISTANT = "USER: ", " ASSISTANT:"


def prompt_of(question: Question, images: int) -> str:
    """Write a question as the tiny host was taught: one ``<image>`` a visit, in LLaVA's roles."""
    return USER + "<image> " * images + question.text + ASSISTANT


class PhantomBatches:
    """A data set that is drawn, shrunk and tokenised once.

    Args:
        dataset: what to draw; all of it is kept in memory, 93 kB a visit at 192 x 192 and 8 bits.
        processor: of the host, :func:`hia.phantom.host.tiny_processor` wrapped by :class:`hia.HiAProcessor`.
        keep_pixels: False leaves out the images at full resolution, which the host alone doesn't need.

    Attributes:
        questions: one a sample.
        views: [n, 3, h, w] fp32, all images as the host sees them, sample by sample.
        pixels: one [H, W, 1] tensor an image; empty without ``keep_pixels``.
        windows: [n, 2] fp32.
        masks: [n, H, W] bool, where a lesion is.
        bones: one an image.
    """

    def __init__(self, dataset: PhantomDataset, processor: HiAProcessor, keep_pixels: bool = True):
        self.questions: list[Question] = []
        self.pixels: list[Tensor] = []
        self.bones: list[str] = []
        self._ids: list[tuple[list[int], list[int]]] = []
        self._images: list[range] = []
        self._pad_id = processor.tokenizer.pad_token_id
        if not len(dataset):
            raise ValueError("hia.phantom: dataset must hold at least one sample, got none")
        views, windows, masks = [], [], []
        for number in range(len(dataset)):
            sample = dataset[number]
            text = prompt_of(sample.question, len(sample.images))
            inputs = processor(text, sample.images, sample.question.answer, padding_side="right")
            row, asked = inputs.input_ids[0].tolist(), int(inputs.instruction_index[0]) + 1
            self._ids.append((row[:asked], row[asked:]))
            self._images.append(range(len(self.bones), len(self.bones) + len(sample.images)))
            self.questions.append(sample.question)
            self.bones += [sample.study.bone] * len(sample.images)
            self.pixels += [image.pixels for image in sample.images] if keep_pixels else []
            views.append(inputs.pixel_values)
            windows += [image.window for image in sample.images]
            masks += [visit.mask() for visit in sample.study.visits]
        self.views, self.windows, self.masks = (
            torch.cat(views),
            torch.tensor(windows, dtype=torch.float32),
            torch.stack(masks),
        )

    def __len__(self) -> int:
        return len(self.questions)

    def of_task(self, task: str) -> list[int]:
        """List the samples of one task."""
        return [number for number, question in enumerate(self.questions) if question.task == task]

    def batch(self, samples: Sequence[int], high_res: bool = True) -> HiABatch:
        """Put samples together as :class:`hia.HiAProcessor` does, padded on the right.

        Args:
            samples: their numbers.
            high_res: False makes a batch for the host alone.

        Returns:
            input_ids, attention_mask, labels [B, S]; pixel_values [n, 3, h, w]; with ``high_res`` high_res_pixels,
            windows [n, 2] and instruction_index [B] too.

        Raises:
            ValueError: no samples, or images at full resolution that were not kept.
        """
        if not len(samples):
            raise ValueError("hia.phantom: samples must name at least one, got none")
        if high_res and not self.pixels:
            raise ValueError("hia.phantom: high_res must be False where keep_pixels was False, got True")
        longest = max(sum(map(len, self._ids[sample])) for sample in samples)
        ids = torch.full((len(samples), longest), self._pad_id, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, sample in enumerate(samples):
            asked, answer = self._ids[sample]
            used = len(asked) + len(answer)
            ids[row, :used], mask[row, :used] = torch.tensor(asked + answer, dtype=torch.int64), 1
            labels[row, len(asked) : used] = torch.tensor(answer, dtype=torch.int64)
        images = [image for sample in samples for image in self._images[sample]]
        batch = HiABatch(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=self.views[images])
        if high_res:
            batch["high_res_pixels"] = [self.pixels[image] for image in images]
            batch["windows"] = self.windows[images]
            last = [len(self._ids[sample][0]) - 1 for sample in samples]
            batch["instruction_index"] = torch.tensor(last, dtype=torch.int64)
        return batch

    def shuffled(self, size: int, seed: int) -> Iterator[list[int]]:
        """Give batches of samples without end: every sample once, in another order each time round."""
        generator = torch.Generator().manual_seed(seed)
        waiting: list[int] = []
        while True:
            while len(waiting) < size:
                waiting += torch.randperm(len(self), generator=generator).tolist()
            yield waiting[:size]
            waiting = waiting[size:]

    @torch.no_grad()
    def score(
        self, model: Any, samples: Sequence[int] | None = None, size: int = 60, high_res: bool = True
    ) -> dict[str, float]:
        """Score a model: the share of each task's samples answered word for word by greedy decoding.

        A greedy decoder gives the whole answer exactly if every token of it is the likeliest behind the true ones
        before it, so one forward a sample tells.

        Args:
            model: :class:`hia.HiAModel` or a bare host; its mode is left as it is.
            samples: their numbers; None takes all.
            size: samples at a time.
            high_res: as in :meth:`batch`.
        """
        right: dict[str, list[bool]] = {}
        asked = range(len(self)) if samples is None else samples
        for start in range(0, len(asked), size):
            some = asked[start : start + size]
            batch = self.batch(some, high_res)
            labels = batch["labels"][:, 1:]
            found = model(**batch).logits[:, :-1].argmax(-1)
            exact = ((found == labels) | (labels == IGNORED)).all(1)
            for sample, hit in zip(some, exact.tolist(), strict=True):
                right.setdefault(self.questions[sample].task, []).append(hit)
        return {task: sum(hits) / len(hits) for task, hits in right.items()}
