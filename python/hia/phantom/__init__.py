"""Synthetic radiographs with questions: bones, soft tissue, noise, and lesions that come, grow, shrink and go.

Data for tests, examples and learning experiments; see docs/phantom.md for what they don't claim to be.
"""

from .anatomy import BONES
from .dataset import PhantomDataset, Sample
from .questions import EXTRA_TASKS, LANGUAGES, TASKS, Question, answers, ask, tokens, vocabulary, wordings
from .studies import CHANGES, MARGIN, QUADRANTS, Lesion, PhantomConfig, Study, Visit, draw_study

__all__ = [
    "BONES",
    "CHANGES",
    "EXTRA_TASKS",
    "LANGUAGES",
    "MARGIN",
    "QUADRANTS",
    "TASKS",
    "Lesion",
    "PhantomConfig",
    "PhantomDataset",
    "Question",
    "Sample",
    "Study",
    "Visit",
    "answers",
    "ask",
    "draw_study",
    "tokens",
    "vocabulary",
    "wordings",
]
