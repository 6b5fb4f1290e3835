"""Losses of scores between queries and documents."""

from __future__ import annotations

import math

import pytest
import torch

from intaglio.trainer.ranking_losses import info_nce, margin_mse

NONE = torch.zeros(1, 3, dtype=torch.bool)


def test_info_nce_worked_example() -> None:
    """Logits (already / tau) [2,1,0], positive first: p = 0.66524, CE = 0.40761."""
    assert float(info_nce(torch.tensor([[2.0, 1.0, 0.0]]), NONE)) == pytest.approx(0.40761, abs=1e-5)


def test_excluded_documents_are_not_in_the_softmax() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0]])
    excluded = torch.tensor([[False, True, False]])
    assert float(info_nce(scores, excluded)) == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)


def test_the_symmetric_loss_averages_rows_and_columns_of_the_positives() -> None:
    """C(A,B) = C(B,A) when both have N rows; with M more documents the columns are those of the first N alone."""
    scores = torch.tensor([[2.0, 1.0, 5.0], [0.0, 1.0, 4.0]])
    none = torch.zeros(2, 3, dtype=torch.bool)
    square = scores[:, :2]
    both = info_nce(square, none[:, :2], symmetric=True)
    assert torch.allclose(both, info_nce(square.T.contiguous(), none[:, :2], symmetric=True))
    columns = info_nce(square.T, none[:, :2])
    assert torch.allclose(info_nce(scores, none, symmetric=True), (info_nce(scores, none) + columns) / 2)


def test_margin_mse_compares_each_negative_with_its_own_positive() -> None:
    scores = torch.tensor([[5.0, 9.0, 3.0, 9.0], [9.0, 4.0, 9.0, 1.0]])  # documents 2 and 3 belong to queries 0 and 1
    teacher = torch.tensor([1.0, 2.0, 0.0, 2.5])
    expected = ((2 - 1) ** 2 + (3 + 0.5) ** 2) / 2
    assert float(margin_mse(scores, torch.tensor([0, 1, 0, 1]), teacher)) == pytest.approx(expected)
