"""A map-style data set of studies and questions, each item a function of (seed, index) alone."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..images.radiograph import Radiograph
from .questions import EXTRA_TASKS, LANGUAGES, TASKS, Question, ask, facts
from .studies import PhantomConfig, Seed, Study, check_choice, check_seed, draw_study


@dataclass(frozen=True)
class Sample:
    """One item.

    Attributes:
        images: one radiograph a visit, oldest first: two for "comparative", one for every other task.
        question: text, answer and choices.
        study: what was drawn, with the lesions.
    """

    images: list[Radiograph]
    question: Question
    study: Study


class PhantomDataset:
    """Studies with one question each; nothing is stored, ``dataset[i]`` draws item i.

    Item i has the task ``tasks[i % len(tasks)]``. Among the items of one task the answers come in turn, so that each
    choice is as frequent as any other, to within one; shuffle for training. What the answer leaves open is drawn.

    Args:
        count: the number of items.
        seed: an integer or a tuple of them. Item i is ``draw_study((*seed, i), ...)``, whose streams are seeded with a
            128-bit hash of that tuple: two data sets whose seeds differ share no study. 3 and (3,) are one seed.
        config: what the studies look like; None means ``PhantomConfig()``.
        tasks: some of ``TASKS`` and ``EXTRA_TASKS``, in turn.
        language: "en" or "zh".
        wording: which paraphrase of the questions; None takes them in turn, each with every answer.

    Raises:
        TypeError: another type of count, seed, config or wording. ValueError: a negative count, no task, an unknown
            name.
    """

    def __init__(
        self,
        count: int,
        seed: Seed = 0,
        config: PhantomConfig | None = None,
        tasks: Sequence[str] = TASKS,
        language: str = "en",
        wording: int | None = 0,
    ) -> None:
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"hia.phantom: count must be an integer, got {count!r}")
        if count < 0:
            raise ValueError(f"hia.phantom: count must not be negative, got {count}")
        if config is not None and not isinstance(config, PhantomConfig):
            raise TypeError(f"hia.phantom: config must be a PhantomConfig, got {type(config).__name__}")
        if isinstance(tasks, str) or not tasks:
            raise ValueError(f"hia.phantom: tasks must be a sequence of at least one task, got {tasks!r}")
        for task in tasks:
            check_choice("tasks", task, TASKS + EXTRA_TASKS)
        check_choice("language", language, LANGUAGES)
        if wording is not None and (not isinstance(wording, int) or isinstance(wording, bool)):
            raise TypeError(f"hia.phantom: wording must be an integer or None, got {wording!r}")
        self.count = count
        self.seed = check_seed(seed)
        self.config = config or PhantomConfig()
        self.tasks = tuple(tasks)
        self.language = language
        self.wording = wording

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """Draw one item.

        Raises:
            IndexError: beyond the count; negative indices count from the end.
        """
        index = operator.index(index)
        if not -self.count <= index < self.count:
            raise IndexError(f"hia.phantom: index must be below {self.count}, got {index}")
        index %= self.count
        turn, which = divmod(index, len(self.tasks))
        task = self.tasks[which]
        choices = facts(task)
        round_, choice = divmod(turn, len(choices))
        given: dict[str, Any] = choices[choice]
        visits = 2 if task == "comparative" else 1
        study = draw_study((*self.seed, index), self.config, visits=visits, **given)
        wording = round_ if self.wording is None else self.wording
        question = ask(study, task, self.language, wording)
        return Sample([visit.radiograph for visit in study.visits], question, study)
