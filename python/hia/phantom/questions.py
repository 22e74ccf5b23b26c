"""Templated questions and answers about a study, in English and Chinese, with a vocabulary of a few dozen words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .anatomy import BONES
from .studies import CHANGES, QUADRANTS, Study, check_choice

TASKS = ("description", "disease", "location", "comparative")
EXTRA_TASKS = ("bone",)  # not one of the paper's: the host can answer it from its own small view
LANGUAGES = ("en", "zh")

_QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "description": ("describe the image.", "what does the image show?"),
        "disease": ("is there a lesion?", "does the image show a lesion?"),
        "location": ("where is the lesion?", "which quadrant holds the lesion?"),
        "comparative": ("what changed between the two visits?", "how did the lesion change?"),
        "bone": ("which part is shown?", "which part does the image show?"),
    },
    "zh": {
        "description": ("请描述图像。", "图像显示什么？"),
        "disease": ("有病灶吗？", "图像显示病灶吗？"),
        "location": ("病灶在哪里？", "病灶在哪个象限？"),
        "comparative": ("两次检查有何变化？", "病灶有何变化？"),
        "bone": ("这是哪个部位？", "图像显示哪个部位？"),
    },
}

# the names of studies.py in the words of the answers
_WORDS: dict[str, dict[str, str]] = {
    "en": {
        **{name: name for name in (*BONES, *QUADRANTS, *CHANGES)},
        "yes": "yes.",
        "no": "no.",
        "name": "{}.",
        "with": "{bone} with a lesion, {quadrant}.",
        "without": "{bone} without a lesion.",
    },
    "zh": {
        **dict(zip(BONES, ("股骨", "前臂", "膝关节", "脊柱"), strict=True)),
        **dict(zip(QUADRANTS, ("左上", "右上", "左下", "右下"), strict=True)),
        **dict(zip(CHANGES, ("新发", "消失", "增大", "缩小", "不变"), strict=True)),
        "yes": "有。",
        "no": "无。",
        "name": "{}。",
        "with": "{bone}，{quadrant}有病灶。",
        "without": "{bone}，无病灶。",
    },
}


@dataclass(frozen=True)
class Question:
    """One question with its answer.

    Attributes:
        task: one of ``TASKS`` or ``EXTRA_TASKS``.
        language: "en" or "zh".
        text: the question alone; the caller adds "USER:" and one ``<image>`` a visit.
        answer: one of ``choices``.
        choices: every answer that the task has, in a fixed order.
    """

    task: str
    language: str
    text: str
    answer: str
    choices: tuple[str, ...]


def answers(task: str, language: str = "en") -> tuple[str, ...]:
    """List every answer of a task, in the order of :func:`facts`.

    Raises:
        ValueError: no such task or language.
    """
    words = _words(language)
    return tuple(_answer(words, task, fact) for fact in facts(task))


def facts(task: str) -> tuple[dict[str, str | bool], ...]:
    """List what each answer of a task says, as keyword arguments of :func:`~hia.phantom.draw_study`.

    Raises:
        ValueError: no such task.
    """
    check_choice("task", task, TASKS + EXTRA_TASKS)
    if task == "disease":
        return {"lesion": True}, {"lesion": False}
    if task == "location":
        return tuple({"lesion": True, "quadrant": quadrant} for quadrant in QUADRANTS)
    if task == "comparative":
        return tuple({"change": change} for change in CHANGES)
    if task == "bone":
        return tuple({"bone": bone} for bone in BONES)
    found: list[dict[str, str | bool]] = []
    for bone in BONES:
        found += [{"bone": bone, "lesion": True, "quadrant": quadrant} for quadrant in QUADRANTS]
        found.append({"bone": bone, "lesion": False})
    return tuple(found)


def ask(study: Study, task: str, language: str = "en", wording: int = 0) -> Question:
    """Ask about the study's last visit; "comparative" asks about both.

    Args:
        study: of one visit or two.
        task: one of ``TASKS`` or ``EXTRA_TASKS``. "location" needs a lesion, "comparative" two visits.
        language: "en" or "zh".
        wording: which paraphrase of the question, counted from 0 and around; the answer is the same.

    Raises:
        ValueError: no such task or language, or a study that the task doesn't fit.
    """
    words = _words(language)
    check_choice("task", task, TASKS + EXTRA_TASKS)
    lesion = bool(study.visits[-1].lesions)
    if task == "location" and not lesion:
        raise ValueError("hia.phantom: study must have a lesion in its last visit for the task location, got none")
    if task == "comparative" and len(study.visits) != 2:
        raise ValueError(f"hia.phantom: study must have two visits for the task comparative, got {len(study.visits)}")
    fact: dict[str, str | bool] = {"lesion": lesion, "bone": study.bone}
    fact |= {"quadrant": study.quadrant or "", "change": study.change or ""}
    texts = _QUESTIONS[language][task]
    answer = _answer(words, task, fact)
    return Question(task, language, texts[wording % len(texts)], answer, answers(task, language))


def wordings(task: str, language: str = "en") -> tuple[str, ...]:
    """List the paraphrases of a task's question.

    Raises:
        ValueError: no such task or language.
    """
    check_choice("language", language, LANGUAGES)
    check_choice("task", task, TASKS + EXTRA_TASKS)
    return _QUESTIONS[language][task]


def vocabulary() -> list[str]:
    """List every English word, Chinese character and punctuation mark of questions and answers, sorted."""
    found: set[str] = set()
    for language in LANGUAGES:
        for task in TASKS + EXTRA_TASKS:
            for text in wordings(task, language) + answers(task, language):
                found.update(tokens(text))
    return sorted(found)


def tokens(text: str) -> list[str]:
    """Split into words of Latin letters and single characters, without spaces: the unit of :func:`vocabulary`."""
    return re.findall(r"[A-Za-z]+|\S", text)


def _words(language: str) -> dict[str, str]:
    check_choice("language", language, LANGUAGES)
    return _WORDS[language]


def _answer(words: dict[str, str], task: str, fact: dict[str, str | bool]) -> str:
    named = {key: words[value] for key, value in fact.items() if isinstance(value, str) and value}
    if task == "disease":
        return words["yes" if fact["lesion"] else "no"]
    if task == "description":
        return words["with" if fact["lesion"] else "without"].format(**named)
    return words["name"].format(named[{"location": "quadrant", "comparative": "change", "bone": "bone"}[task]])
