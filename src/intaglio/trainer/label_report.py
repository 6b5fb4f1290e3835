"""Suspicious labels of training rows, and their report with texts or thumbnails.

Dimension letters: N examples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.trainer.shown_examples import shown_example

SHOWN, KEPT = 20, 1000
"""Suspicious labels in the report, and in the record."""


@dataclass(frozen=True)
class Suspicion:
    """An example whose target contradicts its label, by `score`, the target of the proposed class less the label's."""

    row: int
    proposed: int
    score: float


def suspicious_labels(targets_NK: Tensor, labels_N: Tensor) -> list[Suspicion]:
    """Return the examples with argmax t_i != y_i, the highest score first; examples never trained on are left out."""
    best_N, proposed_N = targets_NK.max(1)
    score_N = best_N - targets_NK[torch.arange(len(labels_N)), labels_N]
    flagged = ((proposed_N != labels_N) & (score_N > 0)).nonzero().flatten().tolist()
    flagged.sort(key=lambda row: (-float(score_N[row]), row))
    return [Suspicion(row, int(proposed_N[row]), float(score_N[row])) for row in flagged]


def label_report(
    checkpoint: Checkpoint, examples: Sequence[Mapping[str, Any]], suspicions: Sequence[Suspicion], labels_N: Tensor
) -> dict[str, Any]:
    """Return the report of suspicious labels: the most suspicious with their texts or thumbnails."""
    names = getattr(getattr(checkpoint.model, "config", None), "id2label", {})
    table: list[list[str]] = []
    pictures: list[list[str]] = []
    flagged = []
    for number, suspicion in enumerate(suspicions[:KEPT]):
        row = examples[suspicion.row]
        label, proposed = (str(names.get(k, k)) for k in (int(labels_N[suspicion.row]), suspicion.proposed))
        name, score = str(row.get("index", suspicion.row)), f"{suspicion.score:.3f}"
        flagged.append([name, label, proposed, round(suspicion.score, 6)])
        if number < SHOWN:
            shown = shown_example(checkpoint, dict(row))
            table.append([name, label, proposed, score, *([shown["text"]] if "text" in shown else [])])
            if "png" in shown:
                pictures.append([shown["png"], f"{label}: {proposed}? ({score})", name])
    count = len(suspicions)
    summary = f"{count:,} of {len(labels_N):,} labels ({count / len(labels_N):.1%}) contradict what the model learned."
    headings = ["Index", "Label", "Proposed", "Score", *(["Text"] if table and len(table[0]) > 4 else [])]
    title = "Most suspicious labels"
    return {
        "summary": summary,
        "suspicious": count,
        "flagged": flagged,
        "tables": [{"title": title, "headings": headings, "rows": table}] if table else [],
        "thumbnails": [{"title": f"{title}: label, proposed class with its score, name", "items": pictures}]
        if pictures
        else [],
    }
