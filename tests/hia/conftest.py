"""Batches that hold every kind of sample at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import hia
from tests.hia.hosts import stir, tiny_config, tiny_llava, tiny_processor

torch.set_num_threads(1)  # tiny models: a second thread only waits

TWO = "USER: <image> and <image>\ncompare the two studies ASSISTANT:"
NONE = "USER: what is there? ASSISTANT:"
ONE = "USER: <image>\nwhat changed? ASSISTANT:"


def random_images() -> list:
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 1000, (70, 50), dtype=np.uint16),
        rng.integers(0, 256, (33, 90), dtype=np.uint8),
        Image.fromarray(rng.integers(0, 256, (41, 40, 3), dtype=np.uint8)),
    ]


@pytest.fixture
def base():
    return tiny_llava()


@pytest.fixture
def processor(base):
    return hia.HiAProcessor(tiny_processor())


@pytest.fixture
def batch(processor):
    a, b, c = random_images()
    return processor([TWO, NONE, ONE], [[a, b], [], [c]])


@pytest.fixture
def model(base):
    """Make a model whose calls give the same bits whenever they come: no weights fold by themselves."""
    return stir(hia.get_hia_model(base, tiny_config(base), auto_fold=False))


def host_inputs(batch) -> dict:
    """Return what the host alone would be given."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels") if name in batch}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
