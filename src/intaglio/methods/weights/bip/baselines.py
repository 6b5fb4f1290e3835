"""BiP and what it is compared with, by the same interface and counted in the same passes.

A pass is one forward and backward of one batch. BiP and plain alternation take two an iteration, all others one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from torch import Tensor, nn

from intaglio.errors import IntaglioError
from intaglio.methods.weights.bip.pruner import BilevelPruner, LossOf
from intaglio.methods.weights.bip.scored import Report

How = Literal["bip", "alternate", "omp", "imp", "hydra"]
HOW: tuple[How, ...] = ("bip", "alternate", "omp", "imp", "hydra")
ROUND = 0.8
"""What a round of iterative magnitude pruning keeps of what is left."""


def prune(
    model: nn.Module,
    keep: float,
    batches: Iterable[Any],
    loss_fn: LossOf,
    *,
    passes: int,
    how: How = "bip",
    rewind: bool = False,
    score_share: float = 0.5,
    **settings: Any,
) -> Report:
    """Prune a trained model within a budget of forward-backward passes; the last step's weights are what is kept.

    `bip`: passes / 2 iterations of both levels. `alternate`: the same without the implicit term. `omp`: one-shot
    magnitude, then retraining. `imp`: iterative magnitude pruning: in each of n = ceil(log keep / log 0.8) rounds 80 %
    of what is left is kept by magnitude, and the round's share of the passes retrains it. `hydra`: scores are learned
    while the weights stand still (G = theta * g), then the weights while the mask stands still. The rate of the weights
    falls by a cosine over the retraining, for `imp` over each round.

    Args:
        model: a trained dense model in training mode; changed in place, and stock again afterwards.
        keep: share of the weights (or units) kept, above 0 and at most 1.
        batches: at least as many as passes; each is used once.
        loss_fn: `loss_fn(model, batch) -> scalar`.
        passes: the budget.
        how: which. Default `bip`.
        rewind: whether each round of `imp` begins from the dense model's weights. Default False: it goes on.
        score_share: of the passes that `hydra` learns scores with. Default 0.5.
        **settings: of `BilevelPruner`.

    Returns:
        What was kept, and the passes taken: the budget, or one less where two are an iteration.

    Raises:
        IntaglioError: an unknown way, a budget that is too small, too few batches, or as `BilevelPruner`.
    """
    if how not in HOW:
        raise IntaglioError(f"how is {how!r}; accepted: {', '.join(HOW)}")
    if not 0 < score_share < 1:
        raise IntaglioError(f"score_share is {score_share}; a share between 0 and 1 is needed")
    least = len(rounds(keep)) if how == "imp" else 1 if how == "omp" else 2
    if passes < least:
        raise IntaglioError(f"passes is {passes}; {how} needs at least {least}")
    for given in ("steps", "implicit"):
        if given in settings and (given == "steps" or how != "bip"):
            raise IntaglioError(f"{given} is decided by how and passes; leave it out")
    source = _each(iter(batches))
    if how in ("bip", "alternate"):
        implicit = settings.pop("implicit", True) if how == "bip" else False
        pruner = BilevelPruner(model, keep, steps=passes // 2, implicit=implicit, **settings)
        for _ in range(passes // 2):
            pruner.step(next(source), next(source), loss_fn)
    elif how == "hydra":
        scoring = min(passes - 1, max(1, round(score_share * passes)))
        pruner = BilevelPruner(model, keep, steps=scoring, implicit=False, **settings)
        for _ in range(scoring):
            pruner.upper(next(source), loss_fn)
        pruner.done, pruner.steps = 0, passes - scoring
        _retrain(pruner, source, loss_fn, passes - scoring)
    elif how == "omp":
        pruner = BilevelPruner(model, keep, steps=passes, **settings)
        _retrain(pruner, source, loss_fn, passes)
    else:
        pruner = _iterate(model, keep, source, loss_fn, passes, rewind, settings)
    return pruner.finalize()


def rounds(keep: float) -> list[float]:
    """What is kept after each round of iterative magnitude pruning: 0.8, 0.64, ..., and `keep` at last.

    Args:
        keep: share kept at the end.
    """
    if not 0 < keep <= 1:
        raise IntaglioError(f"keep is {keep}; a share above 0 and at most 1 is needed")
    count = max(1, math.ceil(math.log(keep) / math.log(ROUND) - 1e-9))
    return [max(keep, ROUND**number) for number in range(1, count)] + [keep]


def shares(passes: int, count: int) -> list[int]:
    """The passes of each round, as even as can be.

    Args:
        passes: in all.
        count: rounds.
    """
    return [passes * (number + 1) // count - passes * number // count for number in range(count)]


def _iterate(
    model: nn.Module,
    keep: float,
    source: Iterator[Any],
    loss_fn: LossOf,
    passes: int,
    rewind: bool,
    settings: dict[str, Any],
) -> BilevelPruner:
    targets = rounds(keep)
    budgets = shares(passes, len(targets))
    # Made for the share at the end, so that the report compares with the dense net's magnitude at that share.
    pruner = BilevelPruner(model, keep, steps=budgets[0], **settings)
    pruner.scored.keep = targets[0]
    pruner.scored.refresh()
    dense: dict[str, Tensor] | None = None
    if rewind:
        dense = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for number, (target, budget) in enumerate(zip(targets, budgets, strict=True)):
        if number:
            pruner.restart(target, dense, budget)
        _retrain(pruner, source, loss_fn, budget)
    return pruner


def _retrain(pruner: BilevelPruner, source: Iterator[Any], loss_fn: LossOf, count: int) -> None:
    for _ in range(count):
        pruner.lower(next(source), loss_fn)


def _each(source: Iterator[Any]) -> Iterator[Any]:
    yield from source
    raise IntaglioError("the batches ended before the passes did; give at least as many batches as passes")
