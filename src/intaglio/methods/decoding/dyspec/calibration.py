"""Acceptance of drafted tokens by their draft probability: an estimate that may replace that probability.

Counted on earlier steps (`Acceptance.learn`), or beforehand on texts that the target generated (`count_acceptance`), as
static trees are fitted. Under sampling a drawn token is accepted far more often than its draft probability (with
probability sum min(T, D) over the whole distribution), so plain DySpec gives too much of its budget to siblings.

Dimension letters: L tokens of a text, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.methods.decoding.dyspec.residual import Residual
from intaglio.speculative.tree import TokenTree

EDGES = (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
"""Of the bins of R[y]; an edge belongs to the bin above it."""
BINS = len(EDGES) + 1
_BOUNDS = (0.0, *EDGES, 1.0)
WEIGHT = 8.0
"""Trials that the draft probability itself is worth in each bin."""

Counts = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=BINS, max_length=BINS)]


class AcceptanceTable(BaseModel):
    """Acceptance counts of drafted tokens, by their draft probability R[y].

    Args:
        tried: tokens tried in each of the eleven bins of R[y] between 0, `EDGES` and 1.
        accepted: how many of them were accepted.

    Raises:
        ValueError: other than eleven counts, a negative one, or more accepted than tried.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tried: Counts
    accepted: Counts

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for index, (tried, accepted) in enumerate(zip(self.tried, self.accepted, strict=True)):
            if accepted > tried:
                raise ValueError(f"bin {index} has {accepted} tokens accepted of {tried} tried; no more can be")
        return self


class Acceptance:
    """Estimate a(R[y]), nondecreasing: the draft probability at first, then the counts of similar probabilities.

    In each of eleven bins of R[y], with n tokens tried and k of them accepted,

        a(r) = (k + 8 r) / (n + 8).

    If a bin would get a lower estimate than the one below it, the two are pooled, as in isotonic regression: m bins
    with n tokens have (k + 8 m r) / (n + 8 m). In a bin without a trial, a(r) is r, clamped between the estimates of
    the nearest bins with trials.

    Args:
        table: earlier counts. Default None: nothing.

    Attributes:
        tried: tokens tried in each bin.
        accepted: how many of them were accepted.
    """

    def __init__(self, table: AcceptanceTable | None = None) -> None:
        self.tried = [0] * BINS if table is None else list(table.tried)
        self.accepted = [0] * BINS if table is None else list(table.accepted)
        self._pools: list[_Pool] = []

    def __call__(self, share: float) -> float:
        """Return the estimated acceptance probability of R[y] from 0 to 1."""
        if not self._pools:
            self._pools = _pools(self.tried, self.accepted)
        return self._pools[bisect(EDGES, share)].estimate(share)

    def count(self, share: float, accepted: bool) -> None:
        """Count a token that was tried, by its R[y]."""
        index = bisect(EDGES, share)
        self.tried[index] += 1
        self.accepted[index] += accepted
        self._pools = []

    def learn(self, tree: TokenTree, path: Sequence[int], tokens: Sequence[int], drafted: int,
              shares: Sequence[float]) -> None:  # fmt: skip
        """Count the tokens tried in a step: the children along the path, up to the accepted one.

        `tree`, `path`, `tokens` and `drafted` are those of the `Step`, `shares` holds R[y] of each node.
        """
        for index, node in enumerate(path):
            for child in tree.children[node]:
                hit = index < drafted and tree.tokens[child] == tokens[index]
                self.count(shares[child], hit)
                if hit:
                    break

    def table(self) -> AcceptanceTable:
        """Return the counts."""
        return AcceptanceTable(tried=tuple(self.tried), accepted=tuple(self.accepted))


def count_acceptance(
    texts: Iterable[tuple[Tensor, Sequence[int]]], most: int, make: Callable[[Tensor], Residual]
) -> AcceptanceTable:
    """Count how often a node's children would have been accepted, at every token that a greedy target generated.

    Args:
        texts: of each, the draft's distributions [L, V] before the target's tokens, and the tokens [L].
        most: children of a node.
        make: from a distribution [V] to the children in their order.

    Raises:
        IntaglioError: no token at all.
    """
    acceptance = Acceptance()
    for probs_LV, tokens in texts:
        for probs_V, right in zip(probs_LV, tokens, strict=True):
            residual = make(probs_V)
            for _ in range(most):
                if residual.peek() is None:
                    break
                token, share = residual.take()
                acceptance.count(share, token == right)
                if token == right:
                    break
    if not any(acceptance.tried):
        raise IntaglioError("acceptance statistics need at least one text with a continuation")
    return acceptance.table()


@dataclass(frozen=True)
class _Pool:
    """The estimate in some neighbouring bins.

    Args:
        first: bin.
        last: bin.
        accepted: tokens.
        tried: tokens.
        weight: trials that the draft probability is worth.
        low: lower bound of the estimate.
        high: upper bound.
    """

    first: int
    last: int
    accepted: int
    tried: int
    weight: float
    low: float = 0.0
    high: float = 1.0

    def estimate(self, share: float) -> float:
        raw = share if not self.tried else (self.accepted + self.weight * share) / (self.tried + self.weight)
        return min(max(raw, self.low), self.high)

    @property
    def ends(self) -> tuple[float, float]:
        """The estimates at the lowest and the highest share."""
        return self.estimate(_BOUNDS[self.first]), self.estimate(_BOUNDS[self.last + 1])


def _pools(tried: Sequence[int], accepted: Sequence[int]) -> list[_Pool]:
    """Return the pool of each bin."""
    merged: list[_Pool] = []
    for index, (n, k) in enumerate(zip(tried, accepted, strict=True)):
        if not n:
            continue
        pool = _Pool(index, index, k, n, WEIGHT)
        while merged and merged[-1].ends[1] > pool.ends[0]:
            below = merged.pop()
            pool = _Pool(below.first, pool.last, below.accepted + pool.accepted, below.tried + pool.tried,
                         below.weight + pool.weight)  # fmt: skip
        merged.append(pool)
    pools: list[_Pool] = []
    low = 0.0
    for pool in merged:
        pools += [_Pool(index, index, 0, 0, 0.0, low, pool.ends[0]) for index in range(len(pools), pool.first)]
        pools += [pool] * (pool.last + 1 - pool.first)
        low = pool.ends[1]
    return [*pools, *(_Pool(index, index, 0, 0, 0.0, low) for index in range(len(pools), BINS))]
