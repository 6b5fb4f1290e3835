"""Token-classification metrics: macro-F1 over labels, accuracy, strict entity F1 for IOB2 tags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

Labels = Sequence[Sequence[str | None]]
"""Labels of the words of each text."""


def macro_f1(gold: Labels, predicted: Labels) -> float:
    """Return the mean of `f1_scores`."""
    values = f1_scores(gold, predicted).values()
    return sum(values) / len(values) if values else 0.0


def f1_scores(gold: Labels, predicted: Labels) -> dict[str, float]:
    """Return F1 = 2 TP / (2 TP + FP + FN) of each label that occurs in `gold`, sorted by label."""
    pairs = _pairs(gold, predicted)
    right = Counter(a for a, b in pairs if a == b)
    gold_counts, predicted_count = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    return {label: 2 * right[label] / (count + predicted_count[label]) for label, count in sorted(gold_counts.items())}


def accuracy(gold: Labels, predicted: Labels) -> float:
    """Return the share of correctly labelled words."""
    pairs = _pairs(gold, predicted)
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0


def _pairs(gold: Labels, predicted: Labels) -> list[tuple[str, str | None]]:
    return [(a, b) for x, y in zip(gold, predicted, strict=True) for a, b in zip(x, y, strict=True) if a is not None]


def is_iob2(labels: Sequence[str]) -> bool:
    """Return whether labels are IOB2 tags: `O`, `B-X`, `I-X`."""
    return any(label.startswith("B-") for label in labels) and all(
        label == "O" or label[:2] in ("B-", "I-") for label in labels
    )


def entities(tags: Sequence[str | None]) -> set[tuple[str, int, int]]:
    """Return `(type, first word, one past the last)` of the entities of a text.

    An entity begins with B-X and continues with I-X of the same type; other I-X begin none.
    """
    result, kind, begin = set(), "", 0
    for position, tag in enumerate([*tags, "O"]):
        tag = tag or "O"
        if kind and tag != f"I-{kind}":
            result.add((kind, begin, position))
            kind = ""
        if tag.startswith("B-"):
            kind, begin = tag[2:], position
    return result


def strict_f1(gold: Labels, predicted: Labels) -> float:
    """Return micro-averaged F1 of entities; type, beginning and end must match."""
    right = gold_count = predicted_count = 0
    for x, y in zip(gold, predicted, strict=True):
        a, b = entities(x), entities(y)
        right, gold_count, predicted_count = right + len(a & b), gold_count + len(a), predicted_count + len(b)
    return 2 * right / (gold_count + predicted_count) if gold_count + predicted_count else 0.0


def scores(gold: Labels, predicted: Labels) -> dict[str, float]:
    """Return `macro_f1`, `accuracy`, for IOB2 `strict_f1`, and `error` (1 - strict F1, or macro-F1)."""
    result = {"macro_f1": macro_f1(gold, predicted), "accuracy": accuracy(gold, predicted)}
    known = sorted({label for row in gold for label in row if label is not None})
    if is_iob2(known):
        result["strict_f1"] = strict_f1(gold, predicted)
    return {**result, "error": 1.0 - result.get("strict_f1", result["macro_f1"])}
