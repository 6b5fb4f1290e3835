"""Pruning within a budget of forward-backward passes: BiP and its baselines on one interface.

    bip         passes / 2 steps of both levels: `BiP` in `intaglio.train`
    alternate   the same without the implicit term
    omp         one-shot magnitude, then retraining: `BiP` with resting scores
    imp         iterative magnitude pruning (Han et al., 2015): 80 % of the remaining weights are kept in each round
    hydra       scores are learned on fixed weights, G = theta * g, then weights on a fixed mask (Sehwag et al., 2020)

The learning rate of the weights falls by a cosine over the retraining, for `imp` over each round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intaglio.methods.weights.bip import BiP, MaskedModel, overlap
from intaglio.methods.weights.bip.scored import masked, score_gradients, score_rate
from intaglio.trainer import Batch, Example, KeyedRNG, Loss, train

How = Literal["bip", "alternate", "omp", "imp", "hydra"]
LossFn = Callable[[nn.Module, Any], Tensor]
ROUND = 0.8
"""The share of the remaining weights that a round of iterative magnitude pruning keeps."""
MOMENTUM, DECAY = 0.9, 1e-4
"""Of SGD on the weights, as in BiP's code."""


@dataclass(frozen=True)
class PruneResult:
    """Forward-backward passes, and the intersection over union with the mask of magnitude."""

    passes: int
    overlap: float


def prune(
    model: nn.Module,
    keep: float,
    batches: Iterator[Any],
    loss_fn: LossFn,
    *,
    passes: int,
    how: How = "bip",
    lr: float = 0.01,
    lr_mask: float = 0.1,
    gamma: float = 1.0,
    rewind: bool = False,
) -> PruneResult:
    """Prune a trained dense model in place within a budget of passes; the weights of the last step are kept.

    Args:
        model: in training mode; stock again afterwards.
        keep: share of the weights kept, above 0 and at most 1.
        batches: at least as many as passes.
        loss_fn: `loss_fn(model, batch) -> scalar`.
        passes: the budget.
        how: see the module. Default `bip`.
        lr: learning rate of the weights. Default 0.01.
        lr_mask: learning rate of the scores. Default 0.1.
        gamma: of `bip`. Default 1.
        rewind: whether each round of `imp` restarts from the dense model's weights. Default False.
    """
    if how in ("bip", "alternate", "omp"):
        return _with_train(model, keep, batches, loss_fn, passes, how, lr, lr_mask, gamma)
    loop = _Loop(model, keep, batches, loss_fn, lr)
    if how == "hydra":
        for step in range(passes // 2):
            loop.score(lr_mask * score_rate("step", step / (passes // 2)))
        loop.retrain(passes - passes // 2)
    else:
        loop.iterate(rounds(keep), passes, rewind)
    result = PruneResult(loop.passes, overlap(loop.masked.masks, loop.masked.first))
    loop.masked.bake()
    return result


class _Classify:
    """Objective whose rows are whole batches."""

    def __init__(self, loss_fn: LossFn) -> None:
        self.loss_fn = loss_fn

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        (example,) = examples
        return {"batch": example["batch"]}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(self.loss_fn(model, batch["batch"]))


def _with_train(
    model: nn.Module,
    keep: float,
    batches: Iterator[Any],
    loss_fn: LossFn,
    passes: int,
    how: str,
    lr: float,
    lr_mask: float,
    gamma: float,
) -> PruneResult:
    # The first step has no upper one, so T steps of both levels take 2 T - 1 passes.
    steps = passes if how == "omp" else (passes + 1) // 2
    method = BiP(
        sparsity=1 - keep,
        gamma=gamma,
        implicit=how == "bip",
        lr_mask=0.0 if how == "omp" else lr_mask,
        normalise=False,
    )
    result = train(
        model,
        ({"batch": batch} for batch in batches),
        objective=_Classify(loss_fn),
        modifiers=[method],
        steps=steps,
        batch_size=1,
        optimizer="sgd",
        momentum=MOMENTUM,
        weight_decay=DECAY,
        learning_rate=lr,
        warmup=0,
        max_grad_norm=0,
        log_every=1,
    )
    return PruneResult(passes if how == "omp" else 2 * steps - 1, result.history[-1].parts["mask_overlap"])


class _Loop:
    """Steps of the weights and of the scores of a masked model, counted."""

    def __init__(self, model: nn.Module, keep: float, batches: Iterator[Any], loss_fn: LossFn, lr: float) -> None:
        self.model, self.batches, self.loss_fn, self.lr, self.passes = model, batches, loss_fn, lr, 0
        self.masked = MaskedModel(model, 1 - keep, implicit=False)

    def score(self, rate: float) -> None:
        """Take a step of the scores."""
        with self.masked.gradient_probe() as leaves:
            gradients = score_gradients(self.loss_fn(self.model, next(self.batches)), leaves)
        self.masked.learn(gradients, rate)
        self.passes += 1

    def retrain(self, steps: int) -> None:
        """Train the weights under the mask."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        sgd = torch.optim.SGD(trained, lr=self.lr, momentum=MOMENTUM, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
        for _ in range(steps):
            sgd.zero_grad()
            self.loss_fn(self.model, next(self.batches)).backward()
            sgd.step()
            schedule.step()
        sgd.zero_grad()
        self.passes += steps

    def iterate(self, targets: list[float], passes: int, rewind: bool) -> None:
        """Prune to each target by the magnitude of the remaining weights, and retrain."""
        dense = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        for number, (target, steps) in enumerate(zip(targets, shares(passes, len(targets)), strict=True)):
            self.masked.sparsity = 1 - target
            if number:
                with torch.no_grad():
                    for name, score in self.masked.scores.items():
                        score.copy_(masked(self.masked.weights[name], self.masked.masks[name]))
            self.masked.refresh()
            if number and rewind:
                self.model.load_state_dict(dense)
            self.retrain(steps)


def rounds(keep: float) -> list[float]:
    """Return the share kept after each round of iterative magnitude pruning: 0.8, 0.64, ..., `keep`."""
    count = max(1, math.ceil(math.log(keep) / math.log(ROUND) - 1e-9))
    return [max(keep, ROUND**number) for number in range(1, count)] + [keep]


def shares(passes: int, count: int) -> list[int]:
    """Return the passes of each round, as even as possible."""
    return [passes * (number + 1) // count - passes * number // count for number in range(count)]
