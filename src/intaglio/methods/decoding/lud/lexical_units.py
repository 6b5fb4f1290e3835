"""Lexical units: runs of tokens that a model predicts with confidence, each from all tokens before it.

Dimension letters: B rows, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from intaglio.trainer.causal_lm import IGNORED, causal_batch, starts
from intaglio.trainer.preserve_state import preserve_modes
from intaglio.trainer.protocols import Example

READ = 2048
"""Tokens read at a time to find units: their scores are the most that memory holds."""

Unit = tuple[int, int]
"""Positions of its first and last token in the row."""


def units(joins: Sequence[bool], eligible: Sequence[bool], cap: int) -> list[Unit]:
    """Return the units of a row, in order: maximal runs, cut at `cap` tokens.

    Args:
        joins: whether each token may be in the unit of the token before it.
        eligible: whether each token may be in a unit at all.
        cap: most tokens of a unit, k.
    """
    result: list[Unit] = []
    for position, (join, can) in enumerate(zip(joins, eligible, strict=True)):
        if not can:
            continue
        first, last = result[-1] if result else (0, -1)
        if join and last == position - 1 and position - first < cap and result:
            result[-1] = (first, position)
        else:
            result.append((position, position))
    return result


def identify(probabilities: Sequence[float], alpha: float, cap: int) -> list[Unit]:
    """Return the units of a text by each token's probability: p = (.3, .95, .97, .5, .92) and alpha = .9 give two."""
    return units([p >= alpha for p in probabilities], [True] * len(probabilities), cap)


def confident(model: Any, rows: Sequence[Example], alpha: float, top1: bool) -> list[Tensor]:
    """Return for each row which tokens the model predicts with confidence, bool [T]; never the first of a document.

    The model reads them in evaluation mode, a few rows at a time. A confident token has at least the probability
    `alpha` and, with `top1`, is the most likely one.
    """
    size = max(1, READ // max(len(row["input_ids"]) for row in rows))
    joins: list[Tensor] = []
    with preserve_modes(model):
        model.eval()
        for start in range(0, len(rows), size):
            joins += _confident(model, rows[start : start + size], alpha, top1)
    return joins


@torch.no_grad()
def _confident(model: Any, rows: Sequence[Example], alpha: float, top1: bool) -> list[Tensor]:
    batch = causal_batch([{**row, "labels": row["input_ids"]} for row in rows])
    target_BT = batch.pop("target").to(model.device)
    del batch["weight"]
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    logits_BTV = model(**inputs, use_cache=False).logits
    scored_BT = target_BT != IGNORED
    index_BT1 = target_BT.clamp(min=0)[..., None]
    chosen_BT = logits_BTV.gather(-1, index_BT1)[..., 0].float() - logits_BTV.float().logsumexp(-1)
    confident_BT = scored_BT & (chosen_BT.exp() >= alpha)
    if top1:
        confident_BT &= logits_BTV.argmax(-1) == index_BT1[..., 0]
    joins = []
    for row, confident_T in zip(rows, confident_BT.cpu(), strict=True):
        joins_T = torch.zeros(len(row["input_ids"]), dtype=torch.bool)
        joins_T[1:] = confident_T[: len(joins_T) - 1]  # a position predicts the next token
        joins.append(joins_T)
    return joins


def units_of(row: Example, joins_T: Tensor, cap: int) -> list[Unit]:
    """Return the units of a row's labelled tokens; `joins_T` is from `confident`, no unit spans two documents."""
    labels_T = row["labels"] if row.get("labels") is not None else row["input_ids"]
    return units(joins_T.tolist(), (labels_T != IGNORED).tolist(), cap)


def spans(row: Example, row_units: Sequence[Unit]) -> list[Unit]:
    """Return the units of a row that can be learnt in parallel: of at least two tokens, with a token before them."""
    first = set(starts(row).tolist())
    return [(begin, end) for begin, end in row_units if end > begin and begin not in first]


def remainders(row: Example, row_units: Sequence[Unit], cap: int) -> list[Unit]:
    """Return the remainders of units (of any length) from each position, as `spans` and of at most `cap` tokens."""
    return spans(row, [(at, min(end, at + cap - 1)) for begin, end in row_units for at in range(begin, end)])
