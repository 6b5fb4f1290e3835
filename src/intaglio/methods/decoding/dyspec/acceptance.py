"""How often a drafted token is accepted, learnt from what was tried: what may stand in for its draft probability.

Counted on the steps before (`Acceptance.learn`), or beforehand on texts that the target wrote (`counted`), as fixed
trees are fitted. Under sampling a drawn token is accepted far more often than its draft probability says (with
probability sum min(T, D) over the whole law), so plain DySpec gives too much of its budget to siblings.

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
"""Of the bins of R[y]; what lies on an edge belongs to the bin above it."""
BINS = len(EDGES) + 1
_BOUNDS = (0.0, *EDGES, 1.0)
WEIGHT = 8.0
"""Trials that the draft probability itself is worth in each bin."""

Counts = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=BINS, max_length=BINS)]


class AcceptanceTable(BaseModel):
    """What became of drafted tokens, by their draft probability R[y].

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
        for place, (tried, accepted) in enumerate(zip(self.tried, self.accepted, strict=True)):
            if accepted > tried:
                raise ValueError(f"bin {place} has {accepted} tokens accepted of {tried} tried; no more can be")
        return self


class Acceptance:
    """a(R[y]): the draft probability at first, then what was seen of probabilities like it; it never falls.

    In each of eleven bins of R[y], with n tokens tried and k of them accepted,

        a(r) = (k + 8 r) / (n + 8).

    Where a bin would so get a lower chance than one below it, the two are pooled, as in isotonic regression: m bins
    with n tokens have (k + 8 m r) / (n + 8 m). In a bin without a trial, a(r) is r, held between what the nearest bins
    with trials say.

    Args:
        table: what was counted before. Default None: nothing.

    Attributes:
        tried: tokens tried in each bin.
        accepted: how many of them were accepted.
    """

    def __init__(self, table: AcceptanceTable | None = None) -> None:
        self.tried = [0] * BINS if table is None else list(table.tried)
        self.accepted = [0] * BINS if table is None else list(table.accepted)
        self._parts: list[_Part] = []

    def __call__(self, share: float) -> float:
        """The estimated chance of acceptance.

        Args:
            share: R[y], from 0 to 1.
        """
        if not self._parts:
            self._parts = _parts(self.tried, self.accepted)
        return self._parts[bisect(EDGES, share)].chance(share)

    def count(self, share: float, accepted: bool) -> None:
        """Take in what became of a token that was tried.

        Args:
            share: its R[y].
            accepted: whether it was right.
        """
        place = bisect(EDGES, share)
        self.tried[place] += 1
        self.accepted[place] += accepted
        self._parts = []

    def learn(self, tree: TokenTree, path: Sequence[int], tokens: Sequence[int], drafted: int,
              shares: Sequence[float]) -> None:  # fmt: skip
        """Take in what became of the tokens that were tried: the children along the path, up to the accepted one.

        Args:
            tree: what was verified.
            path: as in `Step`.
            tokens: as in `Step`.
            drafted: as in `Step`.
            shares: R[y] of each node of the tree.
        """
        for place, node in enumerate(path):
            for child in tree.children[node]:
                hit = place < drafted and tree.tokens[child] == tokens[place]
                self.count(shares[child], hit)
                if hit:
                    break

    def table(self) -> AcceptanceTable:
        """What has been counted."""
        return AcceptanceTable(tried=tuple(self.tried), accepted=tuple(self.accepted))


def counted(
    texts: Iterable[tuple[Tensor, Sequence[int]]], most: int, make: Callable[[Tensor], Residual]
) -> AcceptanceTable:
    """Count what would have become of a node's children, at every token that a greedy target wrote.

    Args:
        texts: of each, the draft's laws [L, V] before the target's tokens, and the tokens [L].
        most: children of a node.
        make: from a law [V] to the children in their order.

    Raises:
        IntaglioError: no token at all.
    """
    found = Acceptance()
    for laws_LV, tokens in texts:
        for law_V, right in zip(laws_LV, tokens, strict=True):
            left = make(law_V)
            for _ in range(most):
                if left.peek() is None:
                    break
                token, share = left.take()
                found.count(share, token == right)
                if token == right:
                    break
    if not any(found.tried):
        raise IntaglioError("chances of acceptance need at least one text with a continuation")
    return found.table()


@dataclass(frozen=True)
class _Part:
    """The estimate in some neighbouring bins.

    Args:
        first: bin.
        last: bin.
        accepted: tokens.
        tried: tokens.
        weight: trials that the draft probability is worth.
        low: no chance is below.
        high: none is above.
    """

    first: int
    last: int
    accepted: int
    tried: int
    weight: float
    low: float = 0.0
    high: float = 1.0

    def chance(self, share: float) -> float:
        found = share if not self.tried else (self.accepted + self.weight * share) / (self.tried + self.weight)
        return min(max(found, self.low), self.high)

    @property
    def ends(self) -> tuple[float, float]:
        """The chances at the lowest and the highest share."""
        return self.chance(_BOUNDS[self.first]), self.chance(_BOUNDS[self.last + 1])


def _parts(tried: Sequence[int], accepted: Sequence[int]) -> list[_Part]:
    """The part that each bin belongs to."""
    pools: list[_Part] = []
    for place, (n, k) in enumerate(zip(tried, accepted, strict=True)):
        if not n:
            continue
        pool = _Part(place, place, k, n, WEIGHT)
        while pools and pools[-1].ends[1] > pool.ends[0]:
            below = pools.pop()
            pool = _Part(below.first, pool.last, below.accepted + pool.accepted, below.tried + pool.tried,
                         below.weight + pool.weight)  # fmt: skip
        pools.append(pool)
    found: list[_Part] = []
    low = 0.0
    for pool in pools:
        found += [_Part(place, place, 0, 0, 0.0, low, pool.ends[0]) for place in range(len(found), pool.first)]
        found += [pool] * (pool.last + 1 - pool.first)
        low = pool.ends[1]
    return [*found, *(_Part(place, place, 0, 0, 0.0, low) for place in range(len(found), BINS))]
