"""Measurement of infilling: the loss of a middle line given the text on both sides, in the format of the model.

Dimension letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from intaglio.data.infill_format import FillInMiddle, Sentinels
from intaglio.evidence.designs.base import Measured, Values
from intaglio.evidence.engine.claim import Metric
from intaglio.masks import PrefixLM, temporary_visibility
from intaglio.measures.infilling import middle_line
from intaglio.trainer.causal_lm import IGNORED, causal_batch, targets

LINE = Metric("loss of a middle line", "nats a token")
SINGLE = Metric("single tokens filled", "points", "higher", continuous=False)
BATCH = 64
"""Prompts of a forward pass."""

Hole = tuple[list[int], list[int], list[int]]
"""Token ids of prefix, hole and suffix."""


def middle_lines(measured: Measured) -> Values:
    """Return the mean loss of the tokens of all documents' middle lines, and how often a middle token is filled.

    The lines are the test bed's `holes`, if it names them, else those nearest to the middle of the text.
    A model without tokens for infilling, or trained without corruption, has the prefix alone. One with
    fill-in-the-middle tokens is read in both orders, of which the better counts. A Prefix-LM reads as it was trained.
    """
    rows = measured.documents.segments.ids_NT.tolist()
    if hasattr(measured.bed, "holes"):
        lines = measured.bed.holes(measured.key.split, measured.key.base)
    else:
        lines = [hole for row in rows for hole in [_line(measured.checkpoint.tokenizer, row)] if hole is not None]
    singles = [(row[: len(row) // 2], [row[len(row) // 2]], row[len(row) // 2 + 1 :]) for row in rows]
    forms = _forms(measured)
    losses = [_losses(measured, form, lines) for form in forms]
    loss = min(sum(map(sum, every)) / sum(map(len, every)) for every, _ in losses)
    filled = max(sum(correct) / len(correct) for form in forms for _, correct in [_losses(measured, form, singles)])
    return {LINE.name: loss, SINGLE.name: 100 * filled}


def _line(tokenizer: Any, row: Sequence[int]) -> Hole | None:
    hole = middle_line(tokenizer.decode(row, skip_special_tokens=True))
    if hole is None:
        return None
    prefix, line, suffix = tokenizer(list(hole), add_special_tokens=False, verbose=False)["input_ids"]
    return prefix, line, suffix


def _forms(measured: Measured) -> list[Sentinels | FillInMiddle | None]:
    objective = measured.settings.get("objective")
    if objective is None or objective.corruption_ratio == 0:
        return [None]
    sentinels = Sentinels.from_tokenizer(measured.checkpoint.tokenizer)
    if sentinels is not None:
        return [sentinels]
    fim = FillInMiddle.from_tokenizer(measured.checkpoint.tokenizer)
    assert fim is not None  # the other objective adds its tokens
    return [fim, replace(fim, spm=True)]


@torch.no_grad()
def _losses(
    measured: Measured, form: Sentinels | FillInMiddle | None, holes: Sequence[Hole]
) -> tuple[list[list[float]], list[bool]]:
    """Return the losses of each hole's bytes, and which holes greedy decoding would fill right."""
    model, losses, correct = measured.checkpoint.model, [], []
    reads_both_ways = getattr(measured.settings.get("objective"), "attention", "causal") == "prefix"
    for start in range(0, len(holes), BATCH):
        rows, borders = [], []
        for prefix, hole, suffix in holes[start : start + BATCH]:
            prompt = prefix if form is None else form.prompt([prefix, suffix])
            ids_T = torch.tensor([*prompt, *hole])
            labels_T = ids_T.clone()
            labels_T[: len(prompt)] = IGNORED
            rows.append({"input_ids": ids_T, "labels": labels_T})
            borders.append(len(prompt) - 1 if reads_both_ways else 0)
        batch = causal_batch(rows)
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        inputs = {name: batch[name].to(measured.checkpoint.device) for name in ("input_ids", "attention_mask")}
        with temporary_visibility(model, PrefixLM(tuple(borders)) if reads_both_ways else {}):
            logits_BTV = model(**inputs, use_cache=False).logits.float().cpu()
        for row, logits_TV in zip(rows, logits_BTV, strict=True):
            target_T = targets(row)
            places = (target_T != IGNORED).nonzero().flatten()
            picked = logits_TV[places].log_softmax(-1)
            losses.append((-picked.gather(1, target_T[places, None])[:, 0]).tolist())
            correct.append(bool((picked.argmax(-1) == target_T[places]).all()))
    return losses, correct
