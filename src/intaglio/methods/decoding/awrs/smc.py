"""Sequential Monte Carlo over constrained continuations, with particles that share histories.

Dimension letters: N particles, R distinct histories, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from intaglio.constraints import Prefix
from intaglio.methods.decoding.awrs.estimators import Accept, Draw, Draws, WeightedDraws
from intaglio.modeling.anatomy import CACHE
from intaglio.speculative.cache import sampling_cache
from intaglio.speculative.request import Request

Resampling = Literal["multinomial", "systematic"]
Sampler = Callable[[Draws, Accept, float], Draw]
"""Called with draws, the check of a token and the largest probability."""


class NextTokens(Protocol):
    """A language model over growing histories that share prefixes."""

    def start(self) -> np.ndarray:
        """Return the log-weights [1, V] of the first token."""

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Replace the histories: each new row continues row `parents[r]` of the last call by `tokens[r]`.

        Returns:
            log-weights [R, V] of the next tokens.
        """


class CachedHistories:
    """A stock causal model: all histories in one forward pass, the prompt read once.

    Args:
        model: of transformers.
        prompt: token ids, at least one.
        request: processors and the merged config.
    """

    def __init__(self, model: Any, prompt: Sequence[int], request: Request) -> None:
        self._model = model
        self._request = request
        self._ids_RL = torch.tensor([list(prompt)], device=model.device)
        self._cache = sampling_cache(model)

    def start(self) -> np.ndarray:
        """Read the prompt."""
        return self._forward(self._ids_RL)

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Reorder the cache and read a token of every history."""
        rows_R = torch.tensor(parents, device=self._ids_RL.device)
        if list(parents) != list(range(len(self._ids_RL))):
            self._cache.reorder_cache(rows_R)
        tokens_R1 = torch.tensor(tokens, device=self._ids_RL.device)[:, None]
        self._ids_RL = torch.cat([self._ids_RL[rows_R], tokens_R1], 1)
        return self._forward(tokens_R1)

    def _forward(self, ids_RQ: Tensor) -> np.ndarray:
        arguments: dict[str, Any] = {CACHE: self._cache, "use_cache": True}
        logits_RV = self._model(input_ids=ids_RQ, **arguments).logits[:, -1].float()
        scores_RV = self._request.processors(self._ids_RL, logits_RV)
        log_probs_RV: np.ndarray = scores_RV.double().log_softmax(-1).cpu().numpy()
        return log_probs_RV


@dataclass(frozen=True)
class Particle:
    """A weighted partial output.

    Args:
        prefix: its state under the constraint.
        tokens: new tokens, the end token included.
        log_weight: minus infinity once it is dead.
        row: its history's row in the model.
    """

    prefix: Prefix
    tokens: tuple[int, ...] = ()
    log_weight: float = 0.0
    row: int = 0

    @property
    def live(self) -> bool:
        """Whether it continues."""
        return not self.prefix.ended and self.log_weight > -math.inf


@dataclass(frozen=True)
class Population:
    """Weighted outputs of a run.

    Args:
        tokens: new tokens of each particle [N], the end token included.
        texts: their texts [N].
        log_weights: unnormalised [N]; minus infinity for particles that met a dead end.
        proper: whether the weights are proper.
        checks_per_step: tokens that were checked against the constraint beyond masks at each step, for all distinct
            histories together.
        passes: forward passes, the prompt's included.
        resampled: number of resampling steps.
        dead_end: text of the longest dead particle.
    """

    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    log_weights: np.ndarray
    proper: bool
    checks_per_step: tuple[int, ...]
    passes: int
    resampled: int
    dead_end: str

    @property
    def checks(self) -> int:
        """Tokens that were checked beyond masks."""
        return sum(self.checks_per_step)

    @property
    def log_probability(self) -> float:
        """Log of the estimate of P(the model's output meets the constraint): log mean exp of the log-weights [1].

        Its exponential is unbiased for proper weights, and the share of live particles otherwise.
        """
        return log_sum(self.log_weights) - math.log(len(self.tokens))

    @property
    def weights(self) -> np.ndarray:
        """Normalised weights [N]; all 0 if no particle is left."""
        total = log_sum(self.log_weights)
        if total == -math.inf:
            return np.zeros(len(self.tokens))
        weights_N: np.ndarray = np.exp(self.log_weights - total)
        return weights_N / weights_N.sum()

    def distinct(self) -> list[tuple[tuple[int, ...], float, int]]:
        """Return tokens, weight and number of particles of each distinct output with a weight, the heaviest first."""
        merged: dict[tuple[int, ...], tuple[float, int]] = {}
        for tokens, weight in zip(self.tokens, self.weights, strict=True):
            if weight > 0:
                total, count = merged.get(tokens, (0.0, 0))
                merged[tokens] = total + float(weight), count + 1
        items = [(tokens, weight, count) for tokens, (weight, count) in merged.items()]
        return sorted(items, key=lambda item: -item[1])


def log_sum(log_weights: np.ndarray) -> float:
    """Return the log of the summed weights; minus infinity for none."""
    largest = float(np.max(log_weights, initial=-math.inf))
    return largest if math.isinf(largest) else largest + math.log(float(np.exp(log_weights - largest).sum()))


def effective_size(log_weights: np.ndarray) -> float:
    """Return (sum W)^2 / sum W^2; 0 if all are 0."""
    total = log_sum(log_weights)
    return 0.0 if total == -math.inf else math.exp(2 * total - log_sum(2 * log_weights))


def ancestors(log_weights: np.ndarray, scheme: Resampling, rng: np.random.Generator) -> np.ndarray:
    """Draw N ancestors in proportion to the weights, int64 [N]."""
    count = len(log_weights)
    below = np.exp(log_weights - log_sum(log_weights)).cumsum()
    levels = rng.random(count) if scheme == "multinomial" else (rng.random() + np.arange(count)) / count
    drawn: np.ndarray = np.searchsorted(below, levels * below[-1], side="right")
    return drawn.clip(max=int(np.flatnonzero(np.exp(log_weights))[-1]))


@dataclass
class ParticleFilter:
    """Sequential Monte Carlo over a constrained model.

    Args:
        model: the target p.
        start: the empty output under the constraint.
        sampler: estimator of a token's weight.
        particles: number N.
        max_tokens: most new tokens, the end token included; the last is forced to be the end.
        ess_threshold: resample below this share of N effective particles.
        resampling: how ancestors are drawn.
        proper: whether weights are kept.
        prune: whether masks exclude tokens before any is checked.
        rng: source of all draws.
        proposal: model q that tokens are drawn from instead. Default: the target.
    """

    model: NextTokens
    start: Prefix
    sampler: Sampler
    particles: int
    max_tokens: int
    ess_threshold: float
    resampling: Resampling
    proper: bool
    prune: bool
    rng: np.random.Generator
    proposal: NextTokens | None = None
    _checks: list[int] = field(default_factory=list, init=False)
    _verdicts: dict[tuple[int, int], bool] = field(default_factory=dict, init=False)
    _pruned: dict[int, tuple[np.ndarray, float]] = field(default_factory=dict, init=False)

    def __call__(self) -> Population:
        """Return the weighted outputs."""
        particles = [Particle(self.start)] * self.particles
        target_RV = self.model.start()
        proposal_RV = target_RV if self.proposal is None else self.proposal.start()
        passes, resampled = 1, 0
        for step in range(1, self.max_tokens + 1):
            advance = self._step if step < self.max_tokens else self._end
            self._verdicts.clear()
            self._pruned.clear()
            self._checks.append(0)
            prefixes: dict[tuple[int, int], Prefix] = {}
            particles = [
                advance(particle, target_RV[particle.row], proposal_RV[particle.row], prefixes)
                if particle.live else particle
                for particle in particles
            ]  # fmt: skip
            if not any(particle.live for particle in particles):
                break
            log_weights = np.array([particle.log_weight for particle in particles])
            # The tolerance keeps equal weights from resampling at a threshold of 1.
            if effective_size(log_weights) < self.ess_threshold * self.particles * (1 - 1e-12):
                mean = log_sum(log_weights) - math.log(self.particles)
                drawn = ancestors(log_weights, self.resampling, self.rng)
                particles = [replace(particles[index], log_weight=mean) for index in drawn]
                resampled += 1
            histories = dict.fromkeys((p.row, p.tokens[-1]) for p in particles if p.live)
            if not histories:  # resampling left ended particles alone
                break
            rows = {history: row for row, history in enumerate(histories)}
            particles = [replace(p, row=rows[p.row, p.tokens[-1]]) if p.live else p for p in particles]
            parents, tokens = [parent for parent, _ in histories], [token for _, token in histories]
            target_RV = self.model.extend(parents, tokens)
            proposal_RV = target_RV if self.proposal is None else self.proposal.extend(parents, tokens)
            passes += 1
        dead = [particle.prefix.text for particle in particles if not particle.prefix.ended]
        return Population(
            tuple(particle.tokens for particle in particles),
            tuple(particle.prefix.text for particle in particles),
            np.array([particle.log_weight for particle in particles]),
            self.proper, tuple(self._checks), passes, resampled, max(dead, key=len, default=""),
        )  # fmt: skip

    def _accept(self, particle: Particle) -> Accept:
        """Return the check of a token, whose answers the particles of a history share."""
        prefix, row = particle.prefix, particle.row

        def accept(token: int) -> bool:
            if (row, token) not in self._verdicts:
                self._checks[-1] += not prefix.state.exact
                self._verdicts[row, token] = prefix.allows(token)
            return self._verdicts[row, token]

        return accept

    def _step(
        self,
        particle: Particle,
        target_V: np.ndarray,
        proposal_V: np.ndarray,
        prefixes: dict[tuple[int, int], Prefix],
    ) -> Particle:
        """Draw a token of a particle and weight it."""
        if particle.row not in self._pruned:
            self._pruned[particle.row] = self._prune(particle.prefix, proposal_V)
        probs_V, log_mass = self._pruned[particle.row]
        if log_mass == -math.inf:
            return replace(particle, log_weight=-math.inf)
        token, weight = self.sampler(WeightedDraws(probs_V, self.rng), self._accept(particle), float(probs_V.max()))
        if not weight > 0:
            return replace(particle, log_weight=-math.inf)
        # The factor p/q corrects for the proposal; it is 1 where the target proposes.
        added = math.log(weight) + log_mass + float(target_V[token] - proposal_V[token]) if self.proper else 0.0
        child = particle.row, token
        if child not in prefixes:
            prefixes[child] = particle.prefix.extended(token)
        return Particle(prefixes[child], (*particle.tokens, token), particle.log_weight + added, particle.row)

    def _prune(self, prefix: Prefix, log_weights_V: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the normalised probabilities of the tokens that masks leave, and the log of their mass Z0."""
        kept_V = np.zeros(len(log_weights_V), dtype=bool)  # rows of the head without a token stay excluded
        kept_V[: len(prefix.vocabulary)] = prefix.mask() if self.prune else True
        pruned_V = np.where(kept_V, log_weights_V, -math.inf)
        log_mass = log_sum(pruned_V)
        return (np.exp(pruned_V - log_mass) if log_mass > -math.inf else pruned_V), log_mass

    def _end(
        self,
        particle: Particle,
        target_V: np.ndarray,
        proposal_V: np.ndarray,
        prefixes: dict[tuple[int, int], Prefix],
    ) -> Particle:
        """Force the end of a particle where no more tokens fit, with its probability as weight."""
        stops = list(particle.prefix.vocabulary.stops)
        added = log_sum(target_V[stops])
        if added == -math.inf or not particle.prefix.complete():
            return replace(particle, log_weight=-math.inf)
        stop = stops[int(ancestors(target_V[stops], "multinomial", self.rng)[0])]
        log_weight = particle.log_weight + (added if self.proper else 0.0)
        return Particle(particle.prefix.extended(stop), (*particle.tokens, stop), log_weight, particle.row)
