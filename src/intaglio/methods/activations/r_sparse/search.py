"""Evolutionary search for the split of each projection's budget between channels and rank.

A candidate is a vector of alphas, one a projection, on a grid. The fitness is the mean loss on a few calibration
segments with every token sparse. The first population consists of uniform vectors and mutated copies of them; then,
each generation, the better half stays, and as many children come of two parents each, gene by gene from one or the
other, with some genes mutated.

Random draws follow from the seed, the generation and the child. Evaluated losses are cached, so a search that was
killed takes the very same steps again, and known ones take no time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from intaglio import atomic_io
from intaglio.methods.base import Progress, no_progress
from intaglio.trainer.rng import generator

FILE = "search.json"
UNIFORM = (0.95, 1.0, 0.9, 0.8, 0.5)
"""Alphas of the uniform vectors in the first population, after the method's own."""
MAX_MOVE = 4
"""Largest mutation of a gene, in steps of the grid."""

Candidate = tuple[int, ...]
"""Indices into the grid, one a projection."""
Scored = tuple[float, int, Candidate]
"""Loss, rank among equal losses, candidate."""


class Search(BaseModel):
    """Length of the search; see the module.

    Args:
        population: candidates of a generation, at least 2. Default 16.
        generations: after the first population; each evaluates half as many. Default 6.
        segments: of the calibration data, for the loss. Default 4.
        mutation: the chance that a gene is mutated. Default 0.1.
        step: of the grid of alphas. Default 0.05.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    population: Annotated[int, Field(ge=2, le=1000)] = 16
    generations: Annotated[int, Field(ge=0, le=1000)] = 6
    segments: Annotated[int, Field(ge=1)] = 4
    mutation: Annotated[float, Field(ge=0, le=1)] = 0.1
    step: Annotated[float, Field(ge=0.01, le=0.5)] = 0.05

    @property
    def grid(self) -> tuple[float, ...]:
        """The alphas, from 0 to 1."""
        count = round(1 / self.step)
        return tuple(round(index / count, 6) for index in range(count + 1))

    @property
    def children(self) -> int:
        """New candidates of a generation."""
        return self.population // 2

    @property
    def evaluations(self) -> int:
        """Candidates of all generations."""
        return self.population + self.generations * self.children

    def grid_index(self, alpha: float) -> int:
        """Return the index of the nearest grid point."""
        return round(alpha * (len(self.grid) - 1))

    def run(
        self,
        start: Sequence[float],
        fitness: Callable[[Sequence[float]], float],
        *,
        seed: int,
        cache: LossCache,
        progress: Progress = no_progress,
    ) -> tuple[list[float], list[float]]:
        """Return the best vector, and the smallest loss after the first population and each generation.

        Args:
            start: the first vector.
            fitness: the loss of a vector; lower is better.
            seed: of the random draws.
            cache: known losses.
            progress: called after each evaluation.
        """
        grid, done = self.grid, 0

        def loss(candidate: Candidate) -> float:
            nonlocal done
            key = " ".join(map(str, candidate))
            value = cache.losses.get(key)
            if value is None:
                value = fitness([grid[index] for index in candidate])
                value = value if math.isfinite(value) else math.inf
                cache.add(key, value)
            done += 1
            progress(done, self.evaluations, "r_sparse: searching")
            return value

        def rank(older: Sequence[Scored], born: Sequence[Candidate]) -> list[Scored]:
            """Return all candidates from the best to the worst, of equal ones the older first."""
            known = [(value, order, candidate) for order, (value, _, candidate) in enumerate(older)]
            fresh = [(loss(candidate), len(older) + order, candidate) for order, candidate in enumerate(born)]
            return sorted([*known, *fresh], key=lambda scored: scored[:2])

        first = tuple(self.grid_index(alpha) for alpha in start)
        uniform = [(self.grid_index(alpha),) * len(start) for alpha in UNIFORM]
        population: list[Candidate] = list(dict.fromkeys([first, *uniform]))[: self.population]
        seeds = list(population)
        for number in range(len(population), self.population):
            population.append(self._mutated(seeds[number % len(seeds)], generator(seed, "r_sparse", 0, number)))
        ranked = rank([], population)
        best = [ranked[0][0]]
        for generation in range(1, self.generations + 1):
            parents = ranked[: self.population - self.children]
            draws = (generator(seed, "r_sparse", generation, number) for number in range(self.children))
            ranked = rank(parents, [self._child([candidate for *_, candidate in parents], draw) for draw in draws])
            best.append(ranked[0][0])
        return [grid[index] for index in ranked[0][2]], best

    def _child(self, parents: Sequence[Candidate], draws: torch.Generator) -> Candidate:
        """Return a mutated crossover of two random parents."""
        one, other = (parents[int(torch.randint(len(parents), (), generator=draws))] for _ in range(2))
        from_one = torch.rand(len(one), generator=draws) < 0.5
        return self._mutated(
            tuple(a if own else b for a, b, own in zip(one, other, from_one.tolist(), strict=True)), draws
        )

    def _mutated(self, candidate: Candidate, draws: torch.Generator) -> Candidate:
        """Return the candidate with some genes moved along the grid."""
        last = len(self.grid) - 1
        moves = torch.randint(1, MAX_MOVE + 1, (len(candidate),), generator=draws)
        down = torch.rand(len(candidate), generator=draws) < 0.5
        chosen = torch.rand(len(candidate), generator=draws) < self.mutation
        by = torch.where(chosen, torch.where(down, -moves, moves), 0).tolist()
        return tuple(min(last, max(0, index + move)) for index, move in zip(candidate, by, strict=True))


class LossCache:
    """Losses of evaluated candidates, in a file where there is a directory for it.

    Args:
        directory: of the file; None: no file.
        key: identifies what decides the losses; a file with another key is not read.
        resume: whether an existing file is read.
    """

    def __init__(self, directory: Path | None, key: str, resume: bool) -> None:
        self._file = None if directory is None else directory / FILE
        self._key = key
        self.losses: dict[str, float] = {}
        if resume and self._file is not None and self._file.is_file():
            saved = json.loads(self._file.read_text(encoding="utf-8"))
            if saved["key"] == key:
                losses = saved["losses"].items()
                self.losses = {candidate: math.inf if loss is None else loss for candidate, loss in losses}

    def add(self, candidate: str, loss: float) -> None:
        """Add a loss; infinity where it is not finite."""
        self.losses[candidate] = loss
        if self._file is not None:
            plain = {one: value if math.isfinite(value) else None for one, value in self.losses.items()}
            atomic_io.write_json(self._file, {"key": self._key, "losses": plain})
