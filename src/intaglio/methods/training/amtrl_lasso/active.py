"""The algorithm on arrays: exploration, relevance, allocation, drawing and refitting, in rounds.

Dimension letters: N samples, K representation, S sources, T heads of all sources, C target heads, H heads of a source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress, no_progress
from intaglio.methods.training.amtrl_lasso.allocation import Strategy, allocate, largest_penalty, lasso, least_norm
from intaglio.methods.training.amtrl_lasso.representation import (
    LinearMap,
    Samples,
    linear_representation,
    neural_representation,
    perceptron,
    ridge,
)

SHARES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
"""Penalties that `validation` tries, as shares of the least one under which the Lasso is zero."""
HELD_OUT = 0.2
"""Share of the target's samples that `validation` scores on."""
RANK = 8
"""Default features of the representation; fewer heads or inputs allow fewer."""


class Source(Protocol):
    """A source task whose samples are drawn as they are needed."""

    @property
    def available(self) -> int | None:
        """Number of its samples; None: any."""

    def draw(self, count: int) -> Samples:
        """Return the first `count` samples, in an order that stays the same."""


@dataclass(frozen=True)
class Solution:
    """A representation with its heads, and what was drawn to learn it.

    Args:
        phi: from inputs to features, float64 [N, K].
        heads_KT: linear heads of all sources, side by side.
        target_KC: heads of the target.
        nu_TC: coefficients of the target's heads in the sources' heads; zeros under `uniform`.
        relevance_S: of each source, the root of the sum of its squared coefficients.
        counts_RS: samples drawn of each source after each round, the exploration first.
        penalty: of the Lasso; 0 under other strategies.
    """

    phi: nn.Module
    heads_KT: np.ndarray
    target_KC: np.ndarray
    nu_TC: np.ndarray
    relevance_S: np.ndarray
    counts_RS: np.ndarray
    penalty: float

    def features(self, x: np.ndarray) -> np.ndarray:
        """Return the features of inputs [N, K]."""
        return features(self.phi, x)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the target's predictions [N, C]."""
        return self.features(x) @ self.target_KC


@torch.no_grad()
def features(phi: nn.Module, x: np.ndarray) -> np.ndarray:
    """Return the features of inputs [N, K], float64."""
    result: np.ndarray = phi(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))).numpy()
    return result


class ActiveSettings(BaseModel):
    """Settings of the algorithm; see `AMTRLLasso` for their meaning."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    samples: Annotated[int, Field(ge=1)]
    explore: Annotated[int, Field(ge=2)] = 25
    rank: Annotated[int, Field(ge=1)] | None = None
    strategy: Strategy = "l1"
    penalty: Annotated[float, Field(gt=0)] = 0.05
    penalty_rule: Literal["fraction", "absolute", "theory", "validation"] = "fraction"
    rounds: Annotated[int, Field(ge=1)] = 1
    most_tasks: Annotated[int, Field(ge=1)] | None = None
    ridge: Annotated[float, Field(gt=0)] = 1e-3
    iterations: Annotated[int, Field(ge=1)] = 30
    hidden: Annotated[int, Field(ge=1)] | None = None
    steps: Annotated[int, Field(ge=1)] = 300
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2

    def solve(
        self,
        sources: Sequence[Source],
        target: Samples,
        *,
        seed: int = 0,
        network: Callable[[], nn.Module] | None = None,
        nu: np.ndarray | None = None,
        progress: Progress = no_progress,
    ) -> Solution:
        """Draw samples of the sources in rounds, and return the representation with the target's heads.

        Args:
            sources: the source tasks, S.
            target: samples of the target, all of which are used.
            seed: of a network's initial values and of the target's validation split. Default 0.
            network: makes the untrained representation, such as a convolutional network of the inputs, with `rank`
                outputs, which is given then. Default: a linear map, or a perceptron of `hidden` units.
            nu: known coefficients [T, C], which replace the estimate; for experiments. Default: none.
            progress: called after each fit.

        Raises:
            IntaglioError: `samples` is below S times `explore` or above what the sources have, `rank` is above the
                number of heads or inputs, or missing beside a network.
        """
        most = [self.samples if source.available is None else source.available for source in sources]
        low = [min(self.explore, limit) for limit in most]
        if not sum(low) <= self.samples <= sum(most):
            raise IntaglioError(
                f"samples is {self.samples}; exploring {len(sources)} sources takes {sum(low)}, and they have"
                f" {sum(most)}"
            )
        counts = np.array(low)
        history = [counts]
        relevance, nu_TC, penalty = np.zeros(len(sources)), np.zeros((0, target.y_NH.shape[1])), 0.0
        for number in range(1, self.rounds + 1):
            if self.strategy == "uniform":
                weights = np.ones(len(sources))
            else:
                drawn = [source.draw(int(n)) for source, n in zip(sources, counts, strict=True)]
                phi, heads = self.represent(drawn, seed, network)
                nu_TC, penalty = self._coefficients(phi, heads, drawn, target, seed)
                nu_TC = nu_TC if nu is None else nu
                relevance = _by_source(nu_TC, drawn)
                weights = self._kept(relevance) ** (1 if self.strategy == "l1" else 2)
            # Errors of 2^-j need samples in proportion to 4^j.
            total = max(int(counts.sum()), round(self.samples * 4.0 ** (number - self.rounds)))
            counts = allocate(weights, total, counts.tolist(), most)
            history.append(counts)
            progress(number, self.rounds + 1, "amtrl_lasso: allocating")
        drawn = [source.draw(int(n)) for source, n in zip(sources, counts, strict=True)]
        phi, heads = self.represent(drawn, seed, network)
        progress(self.rounds + 1, self.rounds + 1, "amtrl_lasso: fitting")
        if not len(nu_TC):
            nu_TC = np.zeros((sum(s.y_NH.shape[1] for s in drawn), target.y_NH.shape[1]))
        target_KC = ridge(features(phi, target.x), target.y_NH, self.ridge)
        return Solution(phi, np.hstack(heads), target_KC, nu_TC, relevance, np.stack(history), penalty)

    def represent(
        self, drawn: Sequence[Samples], seed: int = 0, network: Callable[[], nn.Module] | None = None
    ) -> tuple[nn.Module, list[np.ndarray]]:
        """Return the representation of samples, and the heads [K, H] of each source."""
        columns = sum(s.y_NH.shape[1] for s in drawn)
        most = columns if drawn[0].x.ndim > 2 else min(columns, drawn[0].x.shape[1])
        if self.rank is None and network is not None:
            raise IntaglioError("rank is missing; a network needs it, the number of its outputs")
        rank = min(RANK, most) if self.rank is None else self.rank
        if rank > most:
            raise IntaglioError(f"rank is {rank}; {most} heads or inputs of the tasks allow at most that many")
        phi: nn.Module
        if network is None and self.hidden is None:
            phi = LinearMap(drawn[0].x.shape[1], rank)
            B_DK = linear_representation(drawn, rank, iterations=self.iterations, strength=self.ridge)
            phi.B_DK.copy_(torch.from_numpy(B_DK))
        else:
            inputs, hidden = drawn[0].x.shape[1], self.hidden or 1
            make = network or (lambda: perceptron(inputs, hidden, rank))
            phi = neural_representation(
                drawn, rank, make, steps=self.steps, learning_rate=self.learning_rate, strength=self.ridge, seed=seed
            )
        return phi, [ridge(features(phi, s.x), s.y_NH, self.ridge) for s in drawn]

    def _kept(self, relevance_S: np.ndarray) -> np.ndarray:
        """Return the relevance, zero but for the sources of the largest."""
        if self.most_tasks is None or self.most_tasks >= len(relevance_S):
            return relevance_S
        kept = np.argsort(-relevance_S, kind="stable")[: self.most_tasks]
        return np.where(np.isin(np.arange(len(relevance_S)), kept), relevance_S, 0.0)

    def _coefficients(
        self, phi: nn.Module, heads: Sequence[np.ndarray], drawn: Sequence[Samples], target: Samples, seed: int
    ) -> tuple[np.ndarray, float]:
        """Return the coefficients [T, C] of the target's heads in the sources', and the penalty of the Lasso."""
        W_KT, Z_NK = np.hstack(heads), features(phi, target.x)
        if self.strategy == "l2":
            return least_norm(W_KT, ridge(Z_NK, target.y_NH, self.ridge)), 0.0
        if self.penalty_rule == "validation":
            return self._validated(W_KT, Z_NK, target.y_NH, seed)
        w_KC = ridge(Z_NK, target.y_NH, self.ridge)
        penalty = self.penalty
        if self.penalty_rule == "fraction":
            penalty *= max(largest_penalty(W_KT, w_K) for w_K in w_KC.T)
        elif self.penalty_rule == "theory":
            left = [(features(phi, s.x) @ W - s.y_NH).ravel() for s, W in zip(drawn, heads, strict=True)]
            sigma = float(np.sqrt(np.square(np.concatenate(left)).mean()))
            penalty *= sigma * math.sqrt((len(W_KT) + math.log(W_KT.shape[1])) / self.explore)
        return np.stack([lasso(W_KT, w_K, penalty) for w_K in w_KC.T], axis=1), penalty

    def _validated(self, W_KT: np.ndarray, Z_NK: np.ndarray, Y_NC: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
        """Return coefficients under the penalty with the least error on a part of the target's samples."""
        order = np.random.default_rng(seed).permutation(len(Z_NK))
        count = max(1, round(HELD_OUT * len(order)))
        held_out, rest = order[:count], order[count:]
        w_KC = ridge(Z_NK[rest], Y_NC[rest], self.ridge)
        scale = max(largest_penalty(W_KT, w_K) for w_K in w_KC.T)

        def solution(share: float) -> np.ndarray:
            return np.stack([lasso(W_KT, w_K, share * scale) for w_K in w_KC.T], axis=1)

        def error(share: float) -> float:
            return float(np.square(Z_NK[held_out] @ W_KT @ solution(share) - Y_NC[held_out]).mean())

        best = min(SHARES, key=error)
        return solution(best), best * scale


def _by_source(nu_TC: np.ndarray, drawn: Sequence[Samples]) -> np.ndarray:
    """Return the root of the sum of squares of the coefficients of each source, whose heads share its samples."""
    ends = np.cumsum([s.y_NH.shape[1] for s in drawn])[:-1]
    return np.array([math.sqrt(float(np.square(part).sum())) for part in np.split(nu_TC, ends)])
