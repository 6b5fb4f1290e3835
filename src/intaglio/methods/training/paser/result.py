"""PASER's pool of scored examples, and its selection as numbers, table and chart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from intaglio.methods.training.paser.select import SelectionRun
from intaglio.trainer.tokenised_samples import Sample

NAME_WORDS = 3
"""Words that a cluster is called by."""


@dataclass(frozen=True)
class Pool:
    """Scored examples; selecting from them again is cheap.

    Args:
        indices: of the unique examples that were considered.
        samples: the tokenised examples.
        labels: cluster of each, from 0.
        degradation: J of each; empty where it is not needed.
        concepts: key phrases of each; empty where they are not needed.
        seconds: time of the parts `embedding`, `clustering`, `comparing`, `concepts`.
        errors: factorisation error by number of clusters.
        examples: total number of examples. Default 0: unknown.
        duplicates: number of duplicates among them. Default 0.
    """

    indices: Sequence[int]
    samples: Sequence[Sample]
    labels: Sequence[int]
    degradation: Sequence[float] = ()
    concepts: Sequence[Sequence[str]] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[int, float] = field(default_factory=dict)
    examples: int = 0
    duplicates: int = 0


@dataclass(frozen=True)
class Choice:
    """Indices of the selected examples, in order, a summary for people and the record, and chart data."""

    indices: tuple[int, ...]
    summary: dict[str, Any]
    bars: dict[str, Any]

    def table(self) -> str:
        """Return the clusters as a Markdown table."""
        rows = self.summary["clusters"]
        head = list(rows[0])
        lines = [head, ["---"] * len(head), *([_cell(row[name]) for name in head] for row in rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def summarise(
    pool: Pool, labels: Sequence[int], selection: SelectionRun, degradation_K: Sequence[float], graph: str
) -> Choice:
    """Summarise a selection."""
    size = Counter(labels)
    taken, skipped = (Counter(labels[n] for n in some) for some in (selection.taken, selection.skipped))
    tokens = [sample.tokens for sample in pool.samples]
    names = _cluster_names(pool.samples, labels)
    clusters = [
        {
            "about": names[k],
            "examples": size[k],
            **({"degradation": degradation_K[k]} if degradation_K else {}),
            "budget": selection.budgets[k],
            "chosen": taken[k],
            "tokens": sum(tokens[n] for n in selection.taken if labels[n] == k),
            "rejected": skipped[k],
        }
        for k in range(len(selection.budgets))
    ]
    summary = {
        "examples": pool.examples,
        "duplicates": pool.duplicates,
        "looked_at": len(pool.samples),
        "chosen": len(selection.taken),
        "tokens": sum(tokens),
        "chosen_tokens": sum(tokens[n] for n in selection.taken),
        "consistency": graph,
        "rejection_rate": selection.rate,
        "seconds": {name: round(value, 3) for name, value in pool.seconds.items()},
        "clusters": clusters,
        **({"factorisation_errors": {str(k): error for k, error in pool.errors.items()}} if pool.errors else {}),
    }
    charted = "degradation" if degradation_K else "chosen"
    bars = {
        "title": "How far the model is from its original, by cluster" if degradation_K else "Chosen of each cluster",
        "axis": "mean Jensen-Shannon divergence, nats" if degradation_K else "examples",
        "items": {
            f"{k}: {row['about']} ({row['chosen']} of {row['examples']})": row[charted]
            for k, row in enumerate(clusters)
        },
    }
    return Choice(tuple(pool.indices[n] for n in selection.taken), summary, bars)


def _cluster_names(samples: Sequence[Sample], labels: Sequence[int]) -> list[str]:
    """Name each cluster by words that are more frequent in it than elsewhere."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    clusters = max(labels, default=-1) + 1
    vectorizer = TfidfVectorizer(stop_words="english", binary=True, token_pattern=r"(?u)\b[^\W\d_]\w+\b")
    try:
        words_NV = vectorizer.fit_transform([sample.instruction for sample in samples])
    except ValueError:  # no text has a word
        return [""] * clusters
    everywhere_V = np.asarray(words_NV.mean(0)).ravel()
    known, names = vectorizer.get_feature_names_out(), []
    for k in range(clusters):
        inside_V = np.asarray(words_NV[np.array(labels) == k].mean(0)).ravel()
        more_V = inside_V - (everywhere_V if clusters > 1 else 0)
        best = [v for v in np.argsort(-more_V, kind="stable")[:NAME_WORDS] if more_V[v] > 0]
        names.append(" ".join(known[v] for v in best))
    return names
