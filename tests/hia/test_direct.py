"""The measurements' maths on vectors whose numbers are known."""

from __future__ import annotations

import math

import pytest
import torch

from hia.layers import direct


def test_cosine_and_rank_of_known_vectors():
    rows = torch.eye(4, dtype=torch.float64)
    assert direct.mean_cosine(rows) == pytest.approx(0) and direct.effective_rank(rows) == pytest.approx(4)
    assert direct.mean_cosine(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])) == pytest.approx(-1)
    assert direct.mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])) == pytest.approx(1)
    assert direct.mean_cosine(torch.zeros(3, 2)) is None and direct.effective_rank(torch.zeros(3, 2)) is None
    assert math.isnan(direct.effective_rank(torch.tensor([[math.nan, 1.0]])))
    assert direct.effective_rank(torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]])) == pytest.approx(2)
