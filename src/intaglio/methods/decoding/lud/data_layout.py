"""Data reconfiguration: rows with PAD inputs instead of a unit's tokens, which are to be predicted at once.

For a unit y_s .. y_e, read from the token before it (the anchor a = s - 1): the input at position s + j - 1 is PAD and
its target y_{s+j}, j = 1 .. e - s; y_s itself is the anchor's ordinary target. There are two layouts:

- `packed`: the row is unchanged, and after its tokens follows a group of PADs for each anchor drawn. A PAD sees the
  real tokens of its document up to the anchor, and the PADs before it in its group; no real token sees a PAD.
- `truncated`: one more row for each anchor drawn: the document up to the anchor, then k - 1 PADs; those beyond the unit
  have no target.

Both give the same logits at every PAD, so the same loss.

Dimension letters: B rows, T tokens of a row, S slots of a row (tokens, PADs, padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.methods.decoding.lud.lexical_units import Unit
from intaglio.speculative.target_model import CachedModel
from intaglio.trainer.causal_lm import IGNORED, causal_batch, positions, starts, targets
from intaglio.trainer.protocols import Batch, Example

_RULE = ("document", "limit", "group")


def as_tensors(rows: Sequence[Example]) -> Batch:
    """Return rows as right-padded tensors: `input_ids` and `labels` [B, T], and `lengths` of the documents."""
    batch = {
        "input_ids": [row["input_ids"] for row in rows],
        "labels": [row["labels"] if row.get("labels") is not None else row["input_ids"] for row in rows],
        "lengths": [torch.diff(starts(row), append=torch.tensor([len(row["input_ids"])])) for row in rows],
    }
    return {name: nn.utils.rnn.pad_sequence(values, batch_first=True) for name, values in batch.items()}


def as_rows(batch: Batch) -> list[Example]:
    """Return the rows of an `as_tensors` batch, on the CPU."""
    rows = []
    for ids_T, labels_T, lengths in zip(
        *(batch[name].cpu() for name in ("input_ids", "labels", "lengths")), strict=True
    ):
        size = int(lengths.sum())
        rows.append({"input_ids": ids_T[:size], "labels": labels_T[:size], "lengths": lengths[lengths > 0]})
    return rows


def sample_units(units: Sequence[Unit], most: int, rng: torch.Generator) -> list[Unit]:
    """Return at most `most` of a row's units, drawn uniformly, in order."""
    chosen = torch.randperm(len(units), generator=rng)[:most].tolist()
    return [units[index] for index in sorted(chosen)]


def packed(rows: Sequence[Example], chosen: Sequence[Sequence[Unit]], pad: int) -> Batch:
    """Return the batch of rows with the groups of PADs of their chosen units after them.

    `input_ids`, `position_ids`, `target` (real tokens) and `pads` (PADs) [B, S]; `visible` is built from `document`,
    `limit` and `group` [B, S].
    """
    extended = [_with_groups(row, units, pad) for row, units in zip(rows, chosen, strict=True)]
    empty = {"input_ids": 0, "position_ids": 0, "target": IGNORED, "pads": IGNORED, "document": -1, "limit": -1,
             "group": 0}  # fmt: skip
    batch: Batch = {
        name: nn.utils.rnn.pad_sequence([row[name] for row in extended], batch_first=True, padding_value=value)
        for name, value in empty.items()
    }
    return batch | {"weight": int((batch["target"] != IGNORED).sum())}


def _with_groups(row: Example, units: Sequence[Unit], pad: int) -> dict[str, Tensor]:
    ids_T, position_T = row["input_ids"], positions(row)
    slots_T = torch.arange(len(ids_T))
    document_T = torch.searchsorted(starts(row), slots_T, right=True)
    pieces = {
        "input_ids": [ids_T],
        "position_ids": [position_T],
        "target": [targets(row)],
        "pads": [torch.full_like(ids_T, IGNORED)],
        "document": [document_T],
        "limit": [slots_T],
        "group": [torch.zeros_like(ids_T)],
    }
    for number, (begin, end) in enumerate(units, 1):
        anchor, count = begin - 1, end - begin
        ones = torch.ones(count, dtype=torch.int64)
        pieces["input_ids"].append(pad * ones)
        pieces["position_ids"].append(position_T[begin:end])
        pieces["target"].append(IGNORED * ones)
        pieces["pads"].append(ids_T[begin + 1 : end + 1])
        pieces["document"].append(document_T[anchor] * ones)
        pieces["limit"].append(anchor * ones)
        pieces["group"].append(number * ones)
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def visible(batch: Batch) -> Tensor:
    """Return the visibility of a `packed` batch, bool [B, S, S] (queries, keys), before any window."""
    document_BS, limit_BS, group_BS = (batch[name] for name in _RULE)
    slots_S = torch.arange(document_BS.shape[1], device=document_BS.device)
    real = (group_BS == 0)[:, None] & (slots_S <= limit_BS[:, :, None])
    earlier = slots_S <= slots_S[:, None]
    own_pads = (group_BS > 0)[:, None] & (group_BS[:, :, None] == group_BS[:, None]) & earlier
    same = document_BS[:, :, None] == document_BS[:, None]
    # Padding sees itself, since the softmax of a query that sees nothing is undefined.
    return (same & (real | own_pads)) | (slots_S == slots_S[:, None])


def truncated(rows: Sequence[Example], chosen: Sequence[Sequence[Unit]], pad: int, slots: int, context: int) -> Batch:
    """Return the `causal_batch` of the rows and one more row for each chosen unit, with `pads` [B, T].

    Args:
        rows: from `trainer.causal`.
        chosen: units of each.
        pad: id of PAD.
        slots: PADs after an anchor, k - 1.
        context: of the model: the longest row.
    """
    more: list[Example] = []
    labels: list[Tensor] = []
    for row, units in zip(rows, chosen, strict=True):
        first = starts(row)
        for begin, end in units:
            ids_T = row["input_ids"][int(first[first < begin].max()) : begin]
            count = min(slots, context - len(ids_T))
            whole_T = torch.cat([ids_T, torch.full((count,), pad)])
            more.append({"input_ids": whole_T, "labels": torch.full_like(whole_T, IGNORED)})
            pads_T = torch.full_like(whole_T, IGNORED)
            pads_T[len(ids_T) : len(ids_T) + end - begin] = row["input_ids"][begin + 1 : end + 1]
            labels.append(pads_T)
    batch = causal_batch([*rows, *more])
    pads_BT = torch.full_like(batch["target"], IGNORED)
    for index, pads_T in enumerate(labels, len(rows)):
        pads_BT[index, : len(pads_T)] = pads_T
    return batch | {"pads": pads_BT}


def logits(model: Any, batch: Batch) -> Tensor:
    """Return the model's logits [B, S, V] on a batch of either layout, on the model's device."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
    if "group" in batch:
        cached = CachedModel(model)  # builds masks by layer type, windows and implementation
        cached.lengths, cached.pads = [0] * len(batch["group"]), [0] * len(batch["group"])
        inputs["attention_mask"] = cached.masks(visible(batch), batch["position_ids"])
    # With a cache the stock models do not detect packed documents.
    logits_BSV: Tensor = model(**inputs, use_cache=False).logits
    return logits_BSV
