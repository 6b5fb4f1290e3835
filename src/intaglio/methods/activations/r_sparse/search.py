"""The evolutionary search for the split of each projection's budget between channels and rank.

A candidate is a vector of alphas, one a projection, on a grid. The fitness is the mean loss on a few calibration
segments with every token sparse. The first population are uniform vectors and changed copies of them; then, each
generation, the better half stays, and as many children come of two parents each, gene by gene from one or the other,
with some genes moved.

What is drawn follows from the seed, the generation and the child. What was evaluated is noted, so that a search that
was killed goes on: it takes the very same steps, and those that are known take no time.
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
"""Alphas of the uniform vectors that the search begins with, behind the one that the step names."""
REACH = 4
"""Steps of the grid that a gene is moved by at the most."""

Candidate = tuple[int, ...]
"""Places on the grid, one a projection."""


class Search(BaseModel):
    """How long the search goes on; see the module.

    Args:
        population: candidates of a generation, at least 2. Default 16.
        generations: behind the first population; each evaluates half as many. Default 6.
        segments: of the calibration data that the loss is taken on. Default 4.
        mutation: the chance that a gene is moved. Default 0.1.
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
        return tuple(round(place / count, 6) for place in range(count + 1))

    @property
    def children(self) -> int:
        """New candidates of a generation."""
        return self.population // 2

    @property
    def evaluations(self) -> int:
        """Candidates in all."""
        return self.population + self.generations * self.children

    def place(self, alpha: float) -> int:
        """The nearest place on the grid.

        Args:
            alpha: 0 to 1.
        """
        return round(alpha * (len(self.grid) - 1))

    def run(
        self,
        start: Sequence[float],
        fitness: Callable[[Sequence[float]], float],
        *,
        seed: int,
        journal: Journal,
        progress: Progress = no_progress,
    ) -> tuple[list[float], list[float]]:
        """Search, and return the best vector and the least loss after the first population and each generation.

        Args:
            start: the vector to begin with.
            fitness: the loss of a vector; lower is better.
            seed: of what is drawn.
            journal: what is known already.
            progress: called after each evaluation.
        """
        grid, done = self.grid, 0

        def loss(candidate: Candidate) -> float:
            nonlocal done
            found = journal.known.get(_written(candidate))
            if found is None:
                found = fitness([grid[place] for place in candidate])
                journal.note(_written(candidate), found if math.isfinite(found) else math.inf)
            done += 1
            progress(done, self.evaluations, "r_sparse: searching")
            return found if math.isfinite(found) else math.inf

        first = tuple(self.place(alpha) for alpha in start)
        uniform = [tuple([self.place(alpha)] * len(start)) for alpha in UNIFORM]
        population = list(dict.fromkeys([first, *uniform]))[: self.population]
        seeds = list(population)
        while len(population) < self.population:
            number = len(population)
            population.append(self._moved(seeds[number % len(seeds)], generator(seed, "r_sparse", 0, number)))
        ranked = sorted(((loss(one), place, one) for place, one in enumerate(population)), key=lambda found: found[:2])
        best = [ranked[0][0]]
        for generation in range(1, self.generations + 1):
            parents = ranked[: self.population - self.children]
            born = []
            for number in range(self.children):
                draws = generator(seed, "r_sparse", generation, number)
                one, other = (parents[int(torch.randint(len(parents), (), generator=draws))][2] for _ in range(2))
                from_one = torch.rand(len(start), generator=draws) < 0.5
                child = tuple(a if own else b for a, b, own in zip(one, other, from_one.tolist(), strict=True))
                born.append(self._moved(child, draws))
            older = [(found, place, one) for place, (found, _, one) in enumerate(parents)]
            ranked = sorted(
                [*older, *((loss(one), len(older) + place, one) for place, one in enumerate(born))],
                key=lambda found: found[:2],
            )
            best.append(ranked[0][0])
        return [grid[place] for place in ranked[0][2]], best

    def _moved(self, candidate: Candidate, draws: torch.Generator) -> Candidate:
        """The candidate with some genes moved along the grid."""
        last = len(self.grid) - 1
        moves = torch.randint(1, REACH + 1, (len(candidate),), generator=draws)
        down = torch.rand(len(candidate), generator=draws) < 0.5
        chosen = torch.rand(len(candidate), generator=draws) < self.mutation
        by = torch.where(chosen, torch.where(down, -moves, moves), 0).tolist()
        return tuple(min(last, max(0, place + move)) for place, move in zip(candidate, by, strict=True))


def _written(candidate: Candidate) -> str:
    return " ".join(map(str, candidate))


class Journal:
    """The losses of candidates, in a file where there is a directory for it.

    Args:
        directory: where; None: nowhere.
        key: what decides the losses; a file of another key is not read.
        resume: whether one that is there is read.
    """

    def __init__(self, directory: Path | None, key: str, resume: bool) -> None:
        self._file = None if directory is None else directory / FILE
        self._key = key
        self.known: dict[str, float] = {}
        if resume and self._file is not None and self._file.is_file():
            there = json.loads(self._file.read_text(encoding="utf-8"))
            if there["key"] == key:
                self.known = {one: math.inf if loss is None else loss for one, loss in there["losses"].items()}

    def note(self, candidate: str, loss: float) -> None:
        """Keep a loss.

        Args:
            candidate: written.
            loss: of it; infinity where it is not finite.
        """
        self.known[candidate] = loss
        if self._file is not None:
            plain = {one: found if math.isfinite(found) else None for one, found in self.known.items()}
            atomic_io.write_json(self._file, {"key": self._key, "losses": plain})


__all__ = ["FILE", "Journal", "Search"]
