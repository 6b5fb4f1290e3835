"""How well words are labelled: macro-F1 over labels, accuracy, and strict F1 of whole entities in IOB2 tags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

Labels = Sequence[Sequence[str | None]]
"""Labels of the words of each text."""


def macro_f1(gold: Labels, predicted: Labels) -> float:
    """Return the mean over labels of F1 = 2 TP / (2 TP + FP + FN), over the labels that occur in `gold`.

    Args:
        gold: the labels; words with None are left out.
        predicted: as many; None counts as wrong.
    """
    pairs = _pairs(gold, predicted)
    right = Counter(a for a, b in pairs if a == b)
    wanted, said = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    scores = [2 * right[label] / (count + said[label]) for label, count in sorted(wanted.items())]
    return sum(scores) / len(scores) if scores else 0.0


def accuracy(gold: Labels, predicted: Labels) -> float:
    """Return the share of words whose label is right.

    Args:
        gold: the labels; words with None are left out.
        predicted: as many.
    """
    pairs = _pairs(gold, predicted)
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0


def _pairs(gold: Labels, predicted: Labels) -> list[tuple[str, str | None]]:
    return [(a, b) for x, y in zip(gold, predicted, strict=True) for a, b in zip(x, y, strict=True) if a is not None]


def is_iob2(labels: Sequence[str]) -> bool:
    """Return whether labels are IOB2 tags: `O`, `B-X`, `I-X`.

    Args:
        labels: all that there are.
    """
    return any(label.startswith("B-") for label in labels) and all(
        label == "O" or label[:2] in ("B-", "I-") for label in labels
    )


def entities(tags: Sequence[str | None]) -> set[tuple[str, int, int]]:
    """Return `(type, first word, one past the last)` of the entities of a text, strictly read.

    An entity begins with B-X and goes on with I-X of the same type; an I-X that continues none begins none.

    Args:
        tags: IOB2 tags.
    """
    found, kind, begin = set(), "", 0
    for place, tag in enumerate([*tags, "O"]):
        tag = tag or "O"
        if kind and tag != f"I-{kind}":
            found.add((kind, begin, place))
            kind = ""
        if tag.startswith("B-"):
            kind, begin = tag[2:], place
    return found


def strict_f1(gold: Labels, predicted: Labels) -> float:
    """Return micro-averaged F1 of entities; right are those with the same type, beginning and end.

    Args:
        gold: IOB2 tags.
        predicted: as many; None is read as O.
    """
    right = wanted = said = 0
    for x, y in zip(gold, predicted, strict=True):
        a, b = entities(x), entities(y)
        right, wanted, said = right + len(a & b), wanted + len(a), said + len(b)
    return 2 * right / (wanted + said) if wanted + said else 0.0


def scores(gold: Labels, predicted: Labels) -> dict[str, float]:
    """Return `macro_f1`, `accuracy`, `error` (1 - the F1 that counts: less is better), for IOB2 `strict_f1` too.

    Args:
        gold: the labels.
        predicted: as many.
    """
    found = {"macro_f1": macro_f1(gold, predicted), "accuracy": accuracy(gold, predicted)}
    known = sorted({label for row in gold for label in row if label is not None})
    if is_iob2(known):
        found["strict_f1"] = strict_f1(gold, predicted)
    return {**found, "error": 1.0 - found.get("strict_f1", found["macro_f1"])}
