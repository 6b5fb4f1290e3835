"""Lexical units: runs of tokens that a model predicts with confidence, each from all that stands before it.

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
"""Tokens that are read at a time to find units in: their scores are the most that is held."""

Unit = tuple[int, int]
"""Places of its first and last token in the row."""


def units(joins: Sequence[bool], eligible: Sequence[bool], cap: int) -> list[Unit]:
    """Return the units of a row, in order: maximal runs, cut at `cap` tokens.

    Args:
        joins: whether each token may be in the unit of the one before it.
        eligible: whether each token may be in a unit at all.
        cap: most tokens of a unit, k.
    """
    found: list[Unit] = []
    for place, (join, can) in enumerate(zip(joins, eligible, strict=True)):
        if not can:
            continue
        first, last = found[-1] if found else (0, -1)
        if join and last == place - 1 and place - first < cap and found:
            found[-1] = (first, place)
        else:
            found.append((place, place))
    return found


def identify(probabilities: Sequence[float], alpha: float, cap: int) -> list[Unit]:
    """Return the units of a text of which every token counts: p = (.3, .95, .97, .5, .92) and alpha = .9 give two.

    Args:
        probabilities: of each token, given those before it.
        alpha: least probability with which a token joins the unit before it.
        cap: most tokens of a unit, k.
    """
    return units([p >= alpha for p in probabilities], [True] * len(probabilities), cap)


def confident(model: Any, rows: Sequence[Example], alpha: float, top1: bool) -> list[Tensor]:
    """Return for each row which tokens the model predicts with confidence, bool [T]; never the first of a document.

    The model reads them in evaluation mode, a few rows at a time.

    Args:
        model: a causal model.
        rows: as `trainer.causal` makes them.
        alpha: least probability.
        top1: whether the token must be the most likely one too.
    """
    size = max(1, READ // max(len(row["input_ids"]) for row in rows))
    found = []
    with preserve_modes(model):
        model.eval()
        for start in range(0, len(rows), size):
            found += _confident(model, rows[start : start + size], alpha, top1)
    return found


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
    sure_BT = scored_BT & (chosen_BT.exp() >= alpha)
    if top1:
        sure_BT &= logits_BTV.argmax(-1) == index_BT1[..., 0]
    found = []
    for row, sure_T in zip(rows, sure_BT.cpu(), strict=True):
        joins_T = torch.zeros(len(row["input_ids"]), dtype=torch.bool)
        joins_T[1:] = sure_T[: len(joins_T) - 1]  # what is predicted at a place is the next token
        found.append(joins_T)
    return found


def units_of(row: Example, joins_T: Tensor, cap: int) -> list[Unit]:
    """Return the units of a row; they lie in what is learnt of it (the answers), none reaches over two documents.

    Args:
        row: as `trainer.causal` makes them.
        joins_T: from `confident`.
        cap: most tokens of a unit, k.
    """
    labels_T = row["labels"] if row.get("labels") is not None else row["input_ids"]
    return units(joins_T.tolist(), (labels_T != IGNORED).tolist(), cap)


def spans(row: Example, found: Sequence[Unit]) -> list[Unit]:
    """Return the units that can be learnt in parallel: of at least two tokens, with a token before them.

    Args:
        row: as `trainer.causal` makes them.
        found: its units.
    """
    first = set(starts(row).tolist())
    return [(begin, end) for begin, end in found if end > begin and begin not in first]


def rests(row: Example, found: Sequence[Unit], cap: int) -> list[Unit]:
    """Return what is left of a unit from each of its places on, as `spans` does and of at most `cap` tokens.

    Args:
        row: as `trainer.causal` makes them.
        found: its units, of any length.
        cap: most tokens, k.
    """
    return spans(row, [(place, min(end, place + cap - 1)) for begin, end in found for place in range(begin, end)])
