"""Which samples are taken: each cluster's in the order of their rank, as far as its budget and the graph let them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from intaglio.methods.training.paser.budgets import budgets
from intaglio.methods.training.paser.concepts import ConsistencyGraph

Order = Literal["round_robin", "sequential"]


@dataclass
class Walk:
    """What a walk did.

    Args:
        taken: samples in the order in which they were taken.
        skipped: those that did not fit the graph, in order.
        budgets: of each cluster, as first given out.
        refused: how many did not fit, those among them that were taken last.
    """

    taken: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    refused: int = 0

    @property
    def rate(self) -> float:
        """The share of the samples that had their turn and did not fit."""
        seen = len(self.taken) + len(self.skipped)
        return self.refused / seen if seen else 0.0


def walk(
    ranked: Sequence[Sequence[int]],
    weights_K: Sequence[float],
    total: int,
    *,
    concepts: Callable[[int], Sequence[str]] | None = None,
    order: Order = "round_robin",
    whole: bool = True,
    last: bool = False,
) -> Walk:
    """Take samples.

    Args:
        ranked: the samples of each cluster, best first.
        weights_K: of each cluster, see `budgets`.
        total: samples at the most.
        concepts: of a sample, for the graph. Default: no graph.
        order: `round_robin` (default) takes one of each cluster in turn, so that none finds a graph that the others
            have filled; `sequential` empties one budget after the other.
        whole: whether what a cluster cannot fill is given to others. Default True.
        last: whether samples that do not fit are taken after all, once no others are left. Default False.
    """
    done, graph = Walk(), ConsistencyGraph()
    at = [0] * len(ranked)

    def take(k: int) -> bool:
        """Take the next sample of a cluster that fits, if there is one."""
        while at[k] < len(ranked[k]):
            sample = ranked[k][at[k]]
            at[k] += 1
            found = () if concepts is None else concepts(sample)
            if graph.consistent(found):
                graph.add(found)
                done.taken.append(sample)
                return True
            done.skipped.append(sample)
        return False

    while True:
        left = [len(samples) - n for samples, n in zip(ranked, at, strict=True)]
        given = budgets(weights_K, left, total - len(done.taken), whole=whole)
        done.budgets = done.budgets or given
        before = sum(at)
        for k in _turns(given, order):
            take(k)
        if not whole or sum(at) == before:
            break
    done.refused = len(done.skipped)
    if last:
        late = done.skipped[: total - len(done.taken)]
        done.taken, done.skipped = done.taken + late, done.skipped[len(late) :]
    return done


def _turns(given: Sequence[int], order: Order) -> list[int]:
    """Whose turn it is: each cluster as often as its budget says."""
    if order == "sequential":
        return [k for k, count in enumerate(given) for _ in range(count)]
    return [k for turn in range(max(given, default=0)) for k, count in enumerate(given) if turn < count]
