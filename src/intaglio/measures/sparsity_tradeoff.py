"""Analysis of accuracy against sparsity: paired tests, tolerated sparsity, equal-FLOP comparison, scaling law.

With N parameters in matrix products, L layers, H heads of width d, a context of n tokens and the sparsity s,

    prefill  2 N n + 4 L H d (1 - s) n (n + 1) / 2 + estimate      decode, a token  2 N + 4 L H d (1 - s) n + estimate
    log accuracy = a + b_N log N + b_n log n + b_c log (1 / (1 - s))

Source: Nawrot et al., The Sparse Frontier, 2025, arXiv 2504.17768, sections on isoFLOPS and scaling laws. The paper's
exact constants, its test and the form of its law are not in the released code; the usual ones are taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio.errors import IntaglioError

DRAWS = 4000
"""Resamples of a bootstrap."""
LEVEL = 0.05


@dataclass(frozen=True)
class Interval:
    """A mean paired difference and its bootstrap interval of 95 %."""

    mean: float
    low: float
    high: float

    @property
    def worse(self) -> bool:
        """Whether the mean is below zero beyond chance."""
        return self.high < 0


def paired_bootstrap(baseline: Sequence[float], method: Sequence[float], seed: int = 0) -> Interval:
    """Return the mean of method minus baseline over the same samples, with a percentile bootstrap interval.

    Args:
        baseline: scores, one a sample.
        method: scores of the same samples.
        seed: of the resamples. Default 0.

    Raises:
        IntaglioError: no samples, or different numbers of them.
    """
    if not baseline or len(baseline) != len(method):
        raise IntaglioError(
            f"{len(baseline)} and {len(method)} scores were given; equally many, at least one, are needed"
        )
    differences = np.asarray(method, dtype=float) - np.asarray(baseline, dtype=float)
    rows = np.random.default_rng(seed).integers(len(differences), size=(DRAWS, len(differences)))
    low, high = np.quantile(differences[rows].mean(1), (LEVEL / 2, 1 - LEVEL / 2))
    return Interval(float(differences.mean()), float(low), float(high))


@dataclass(frozen=True)
class StudyCell:
    """A cell of the study: a model, a length and a method at a measured sparsity.

    Args:
        model: name of the model.
        parameters: N.
        task: name of the task.
        condition: where the question stands.
        length: n, tokens of the prompt.
        method: name of the pattern or policy.
        phase: `prefill` or `decode`.
        target: requested sparsity.
        sparsity: measured sparsity, whole tiles counted.
        scores: score of each sample.
        flops: of the prompt and the answer.
        difference: of the scores from dense attention; None for dense attention itself.
    """

    model: str
    parameters: int
    task: str
    condition: str
    length: int
    method: str
    phase: str
    target: float
    sparsity: float
    scores: tuple[float, ...]
    flops: float
    difference: Interval | None = None

    @property
    def accuracy(self) -> float:
        """Mean score."""
        return float(np.mean(self.scores))


def prefill_flops(
    parameters: int, layers: int, width: int, length: int, sparsity: float, num_queries: int = 0
) -> float:
    """Return the operations of a prompt.

    Args:
        parameters: N.
        layers: L.
        width: H d, heads times their width.
        length: n.
        sparsity: s of the prompt's pairs.
        num_queries: queries from which a method estimates its pattern: 2 operations a query, token and channel.
    """
    pairs = (1 - sparsity) * length * (length + 1) / 2
    return 2.0 * parameters * length + layers * width * (4 * pairs + 2 * num_queries * length)


def decode_flops(
    parameters: int, layers: int, width: int, length: int, sparsity: float, estimated_keys: float = 0
) -> float:
    """Return the operations of a decoded token; `estimated_keys` is the number of page scores or the like it takes."""
    return 2.0 * parameters + layers * width * (4 * (1 - sparsity) * length + 2 * estimated_keys)


def tolerated_sparsity(points: Iterable[StudyCell]) -> dict[tuple[str, ...], float | None]:
    """Return the largest measured sparsity of each cell up to which no accuracy is lost beyond chance.

    A cell is `(model, task, condition, length, method)`. Sparsities are passed from the lowest on, and the first one
    with a significant loss ends the walk, so that a lucky high one does not count. None where dense attention has no
    right answer, so that nothing can be lost.
    """
    cells: dict[tuple[str, ...], list[StudyCell]] = {}
    hopeless: set[tuple[str, ...]] = set()
    for point in points:
        task: tuple[str, ...] = (point.model, point.task, point.condition, str(point.length))
        if point.difference is not None:
            cells.setdefault((*task, point.method), []).append(point)
        elif point.accuracy == 0:
            hopeless.add(task)
    result: dict[tuple[str, ...], float | None] = {}
    for cell, members in cells.items():
        best = 0.0
        for point in sorted(members, key=lambda p: p.sparsity):
            assert point.difference is not None
            if point.difference.worse:
                break
            best = max(best, point.sparsity)
        result[cell] = None if cell[:-1] in hopeless else best
    return result


def equal_flops(points: Sequence[StudyCell], bins_per_decade: int = 4) -> list[dict[str, Any]]:
    """Return for each bin of equal operations on a log scale its points and the most accurate one.

    Args:
        points: of one task and condition; several models make it a comparison.
        bins_per_decade: bins in a factor of ten. Default 4.
    """
    bins: dict[int, list[StudyCell]] = {}
    for point in points:
        bins.setdefault(math.floor(math.log10(point.flops) * bins_per_decade), []).append(point)
    rows = []
    for index, members in sorted(bins.items()):
        best = max(members, key=lambda p: (p.accuracy, -p.flops))
        rows.append(
            {
                "flops": 10 ** ((index + 0.5) / bins_per_decade),
                "points": len(members),
                "best": {
                    "model": best.model,
                    "method": best.method,
                    "sparsity": best.sparsity,
                    "accuracy": best.accuracy,
                    "flops": best.flops,
                },
            }
        )
    return rows


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law: coefficients by name, and the share of the variance of log accuracy that it explains.

    `held_out` names what was left out of the fit, and `held_out_r2` is the share explained there (None: nothing was
    left, or it does not vary).
    """

    coefficients: Mapping[str, float]
    r2: float | None
    held_out: str
    held_out_r2: float | None
    points: int

    def predict(self, parameters: float, length: float, sparsity: float) -> float:
        """Return the accuracy that the law predicts."""
        names = {
            "intercept": 1.0,
            "parameters": math.log(parameters),
            "length": math.log(length),
            "compression": -math.log1p(-sparsity),
        }
        return math.exp(sum(value * names[name] for name, value in self.coefficients.items()))


def fit_scaling_law(points: Sequence[StudyCell], floor: float = 0.0) -> ScalingLaw | None:
    """Fit log accuracy by least squares, with the longest length (else the highest sparsity) held out.

    A term whose variable takes a single value is left out. Returns None for fewer points than terms and one more.

    Args:
        points: of one task, phase and method.
        floor: least accuracy, since a logarithm needs one; 0 takes half a right answer in the points' samples.
    """
    usable = [point for point in points if point.sparsity < 1]
    if not usable:
        return None
    least = floor or 0.5 / max(len(point.scores) for point in usable)
    lengths, targets = ({getattr(point, name) for point in usable} for name in ("length", "target"))
    if len(lengths) > 2:
        held_out, test = f"length {max(lengths):,}", [p.length == max(lengths) for p in usable]
    elif len(targets) > 2:
        held_out, test = f"sparsity {max(targets):.0%}", [p.target == max(targets) for p in usable]
    else:
        held_out, test = "", [False] * len(usable)
    columns = {
        "intercept": [1.0] * len(usable),
        "parameters": [math.log(p.parameters) for p in usable],
        "length": [math.log(p.length) for p in usable],
        "compression": [-math.log1p(-p.sparsity) for p in usable],
    }
    out = np.array(test)
    kept = {
        name: np.array(values)
        for name, values in columns.items()
        if name == "intercept" or np.ptp(np.array(values)[~out]) > 0
    }
    if (~out).sum() <= len(kept):
        return None
    matrix = np.stack(list(kept.values()), 1)
    target = np.log([max(p.accuracy, least) for p in usable])
    solution, *_ = np.linalg.lstsq(matrix[~out], target[~out], rcond=None)
    predicted = matrix @ solution

    def explained(rows: Any) -> float | None:
        spread = float(((target[rows] - target[rows].mean()) ** 2).sum()) if rows.any() else 0.0
        return 1 - float(((target[rows] - predicted[rows]) ** 2).sum()) / spread if spread > 0 else None

    coefficients = dict(zip(kept, map(float, solution), strict=True))
    return ScalingLaw(coefficients, explained(~out), held_out, explained(out), int((~out).sum()))
