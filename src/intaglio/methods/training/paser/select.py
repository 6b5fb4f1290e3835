"""Budgeted greedy selection from ranked clusters, subject to the consistency graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from intaglio.methods.training.paser.budgets import budgets
from intaglio.methods.training.paser.concepts import ConsistencyGraph

Order = Literal["round_robin", "sequential"]


@dataclass
class SelectionRun:
    """Selected and skipped samples, in order, the initial budgets, and the number of samples that did not fit."""

    taken: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    refused: int = 0

    @property
    def rate(self) -> float:
        """The share of the visited samples that did not fit."""
        seen = len(self.taken) + len(self.skipped)
        return self.refused / seen if seen else 0.0


def select_samples(
    ranked: Sequence[Sequence[int]],
    weights_K: Sequence[float],
    total: int,
    *,
    concepts: Callable[[int], Sequence[str]] | None = None,
    order: Order = "round_robin",
    redistribute: bool = True,
    last: bool = False,
) -> SelectionRun:
    """Select up to `total` samples from clusters ranked best first."""
    result, graph = SelectionRun(), ConsistencyGraph()
    cursor = [0] * len(ranked)

    def take(k: int) -> bool:
        """Take the next sample of a cluster that fits, if there is one."""
        while cursor[k] < len(ranked[k]):
            sample = ranked[k][cursor[k]]
            cursor[k] += 1
            sample_concepts = () if concepts is None else concepts(sample)
            if graph.consistent(sample_concepts):
                graph.add(sample_concepts)
                result.taken.append(sample)
                return True
            result.skipped.append(sample)
        return False

    while True:
        left = [len(samples) - n for samples, n in zip(ranked, cursor, strict=True)]
        given = budgets(weights_K, left, total - len(result.taken), redistribute=redistribute)
        result.budgets = result.budgets or given
        before = sum(cursor)
        for k in _visits(given, order):
            take(k)
        if not redistribute or sum(cursor) == before:
            break
    result.refused = len(result.skipped)
    if last:
        readmitted = result.skipped[: total - len(result.taken)]
        result.taken, result.skipped = result.taken + readmitted, result.skipped[len(readmitted) :]
    return result


def _visits(given: Sequence[int], order: Order) -> list[int]:
    """Return the order of visits: each cluster as often as its budget."""
    if order == "sequential":
        return [k for k, count in enumerate(given) for _ in range(count)]
    return [k for turn in range(max(given, default=0)) for k, count in enumerate(given) if turn < count]
