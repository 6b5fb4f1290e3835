"""What PASER found out about a pool of examples, and what it took of it: as numbers, as a table, as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from intaglio.methods.training.paser.samples import Sample
from intaglio.methods.training.paser.walk import Walk

NAMING = 3
"""Words that a cluster is called by."""


@dataclass(frozen=True)
class Pool:
    """Examples that were looked at: what choosing goes by. Choosing from them again costs next to nothing.

    Args:
        indices: which of the examples these are: of those that say the same the first, and no more than were asked for.
        samples: they themselves, read.
        labels: the cluster of each, from 0.
        degradation: J of each; empty where it was not needed.
        concepts: key phrases of each; empty where they were not needed.
        seconds: that the parts took: `embedding`, `clustering`, `comparing`, `concepts`.
        errors: `{K: error}` of the numbers of clusters that were tried.
        examples: how many there were in all. Default 0: not known.
        duplicates: of them, those that say what an earlier one says. Default 0.
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
    """What was taken.

    Args:
        indices: of the examples, in the order in which they were taken.
        told: for people and for the record, plain data.
        bars: the same drawn, as a report takes it.
    """

    indices: tuple[int, ...]
    told: dict[str, Any]
    bars: dict[str, Any]

    def table(self) -> str:
        """The clusters as a table of Markdown."""
        rows = self.told["clusters"]
        head = list(rows[0])
        lines = [head, ["---"] * len(head), *([_cell(row[name]) for name in head] for row in rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def tell(pool: Pool, labels: Sequence[int], done: Walk, degradation_K: Sequence[float], graph: str) -> Choice:
    """Put a choice into words.

    Args:
        pool: what was chosen from.
        labels: the cluster of each sample.
        done: what was taken.
        degradation_K: CDS of each cluster; empty where nothing was compared.
        graph: how consistency was seen to.
    """
    size = Counter(labels)
    taken, skipped = (Counter(labels[n] for n in some) for some in (done.taken, done.skipped))
    tokens = [sample.tokens for sample in pool.samples]
    names = _names(pool.samples, labels)
    clusters = [
        {
            "about": names[k],
            "examples": size[k],
            **({"degradation": degradation_K[k]} if degradation_K else {}),
            "budget": done.budgets[k],
            "chosen": taken[k],
            "tokens": sum(tokens[n] for n in done.taken if labels[n] == k),
            "rejected": skipped[k],
        }
        for k in range(len(done.budgets))
    ]
    told = {
        "examples": pool.examples,
        "duplicates": pool.duplicates,
        "looked_at": len(pool.samples),
        "chosen": len(done.taken),
        "tokens": sum(tokens),
        "chosen_tokens": sum(tokens[n] for n in done.taken),
        "consistency": graph,
        "rejection_rate": done.rate,
        "seconds": {name: round(value, 3) for name, value in pool.seconds.items()},
        "clusters": clusters,
        **({"factorisation_errors": {str(k): error for k, error in pool.errors.items()}} if pool.errors else {}),
    }
    drawn = "degradation" if degradation_K else "chosen"
    bars = {
        "title": "How far the model is from its original, by cluster" if degradation_K else "Chosen of each cluster",
        "axis": "mean Jensen-Shannon divergence, nats" if degradation_K else "examples",
        "items": {
            f"{k}: {row['about']} ({row['chosen']} of {row['examples']})": row[drawn] for k, row in enumerate(clusters)
        },
    }
    return Choice(tuple(pool.indices[n] for n in done.taken), told, bars)


def _names(samples: Sequence[Sample], labels: Sequence[int]) -> list[str]:
    """Words that are more usual in a cluster than elsewhere."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    clusters = max(labels, default=-1) + 1
    counted = TfidfVectorizer(stop_words="english", binary=True, token_pattern=r"(?u)\b[^\W\d_]\w+\b")
    try:
        words_NV = counted.fit_transform([sample.instruction for sample in samples])
    except ValueError:  # no text has a word
        return [""] * clusters
    everywhere_V = np.asarray(words_NV.mean(0)).ravel()
    known, found = counted.get_feature_names_out(), []
    for k in range(clusters):
        inside_V = np.asarray(words_NV[np.array(labels) == k].mean(0)).ravel()
        more_V = inside_V - (everywhere_V if clusters > 1 else 0)
        best = [v for v in np.argsort(-more_V, kind="stable")[:NAMING] if more_V[v] > 0]
        found.append(" ".join(known[v] for v in best))
    return found
