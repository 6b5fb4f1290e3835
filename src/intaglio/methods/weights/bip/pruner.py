"""`BilevelPruner`: BiP for any module, one call an iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.errors import IntaglioError
from intaglio.methods.weights.bip.layers import Kind
from intaglio.methods.weights.bip.masks import Scope
from intaglio.methods.weights.bip.scored import Implicit, Report, Schedule, Scored, gradients_at, rate_at

LossOf = Callable[[nn.Module, Any], Tensor]
"""`loss_fn(model, batch) -> scalar`, with its gradient."""


@dataclass(frozen=True)
class Losses:
    """The losses of one iteration.

    Args:
        lower: of the first batch, before the weights' step.
        upper: of the second, before the scores' step.
    """

    lower: float
    upper: float


class BilevelPruner:
    """Learns which weights to keep while it retrains them.

        lower level: theta <- theta - lr (m * g(batch A) + weight_decay theta)
        upper level: s <- s - lr_mask sign(s) (theta * g - (1/gamma) g * (m * g))(batch B);  m = TopK(|s|)

    with g = dl/dz at z = m * theta: one backward at z gives every term. The model is a trained dense one; scores begin
    as a copy of its weights, so the first mask is that of magnitude, and the share is imposed at once.

        pruner = BilevelPruner(net, keep=0.05, steps=1000)
        for batch_a, batch_b in batches:
            pruner.step(batch_a, batch_b, lambda net, batch: cross_entropy(net(batch[0]), batch[1]))
        pruner.finalize()

    Until `finalize` the pruned weights are parametrized (`torch.nn.utils.parametrize`); the model evaluates and can be
    copied as it is. Batch norm is never masked. Its running statistics see the batches of both levels.

    Args:
        model: any module in training mode; changed in place.
        keep: share of the ranked weights (or of the units of each layer) kept, above 0 and at most 1.
        scope: `global` (default), one ranking over all layers, in which each keeps at least one weight; or `layer`.
        kind: `unstructured` (default: all linear layers and convolutions; of a Hugging Face model the projections of
            its blocks), `filter` or `channel` (of each Conv2d, linear layers stay dense), `neuron` or `head` (of each
            block of a Hugging Face model).
        gamma: of the lower level's (gamma/2) ||theta||^2. Default 1.
        lr_mask: of the scores. Default 0.1.
        implicit: False: plain alternation (`accelerate` in the released code). `released`: that code's term. Default
            True: the formula.
        normalise: whether each weight's g is scaled so that its root mean square is that of the kept weights, for
            networks whose layers' gradients are of different scale (transformers). Default False.
        clip: largest norm of each weight's g in the upper level. Default None: any.
        momentum_mask: of the scores' SGD. Default 0.9.
        tied: whether scores share the weights' storage, as in the released code by mistake. Default False.
        guard: whether a global ranking may not empty a layer. Default True.
        p: of the norm by which units are ranked. Default 2.
        ignore: layers left dense, by name or shell pattern. Default: none.
        optimizer: of the lower level, over parameters of the model. Default: SGD with the next three.
        lr: of the weights. Default 0.01.
        momentum: default 0.9.
        weight_decay: of the weights; the derivation has gamma in its place, the paper's code 1e-4. Default 1e-4.
        steps: iterations in all, over which `lr` falls by a cosine (where no optimizer is given) and `lr_mask` by
            `schedule`. Default None: both stay.
        schedule: see `rate_at`. Default `step`, the paper's.

    Raises:
        IntaglioError: a setting is out of range, the model has nothing to prune, or a weight is tied or frozen.

    Source: Zhang et al., Advancing Model Pruning via Bi-level Optimization, NeurIPS 2022, section 3 and algorithm 1.
    The released code (OPTML-Group/BiP) shares the scores' storage with the weights' and multiplies the gradients of the
    scores with themselves where the formula has g * (m * g); `tied` and `implicit="released"` bring both back.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: float,
        *,
        scope: Scope = "global",
        kind: Kind = "unstructured",
        gamma: float = 1.0,
        lr_mask: float = 0.1,
        implicit: Implicit = True,
        normalise: bool = False,
        clip: float | None = None,
        momentum_mask: float = 0.9,
        tied: bool = False,
        guard: bool = True,
        p: float = 2.0,
        ignore: Sequence[str] = (),
        optimizer: torch.optim.Optimizer | None = None,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        steps: int | None = None,
        schedule: Schedule = "step",
    ) -> None:
        for name, value in (("lr_mask", lr_mask), ("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < float("inf"):
                raise IntaglioError(f"{name} is {value}; a number from 0 on is needed")
        if steps is not None and steps < 1:
            raise IntaglioError(f"steps is {steps}; at least 1 is needed")
        self.scored = Scored(
            model,
            keep,
            kind=kind,
            scope=scope,
            gamma=gamma,
            implicit=implicit,
            normalise=normalise,
            clip=clip,
            momentum=momentum_mask,
            tied=tied,
            guard=guard,
            p=p,
            ignore=ignore,
        )
        self.model, self.lr, self.lr_mask, self.steps, self.schedule = model, lr, lr_mask, steps, schedule
        self.done = 0
        self.passes = 0
        self._own = optimizer is None
        self._momentum, self._weight_decay = momentum, weight_decay
        self.optimizer = self._new_optimizer() if optimizer is None else optimizer

    def _new_optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=self.lr, momentum=self._momentum, weight_decay=self._weight_decay)

    @property
    def masks(self) -> dict[str, Tensor]:
        """m of each pruned weight, True = kept, by the name of its module."""
        return self.scored.masks

    def step(self, batch_a: Any, batch_b: Any, loss_fn: LossOf) -> Losses:
        """One iteration: the lower level on one batch, then the upper level on another. Two forward-backward passes.

        Args:
            batch_a: for the weights.
            batch_b: for the scores; another one than `batch_a`.
            loss_fn: `loss_fn(model, batch) -> scalar`.

        Raises:
            IntaglioError: both batches are one object, or a loss or gradient is not finite.
        """
        if batch_a is batch_b:
            raise IntaglioError("the two batches are one; the upper level needs another batch than the lower")
        return Losses(self.lower(batch_a, loss_fn), self.upper(batch_b, loss_fn, advance=False))

    def lower(self, batch: Any, loss_fn: LossOf) -> float:
        """The lower level alone: one step of the weights under the mask as it is.

        Args:
            batch: for the weights.
            loss_fn: as in `step`.
        """
        if self.scored.tied:
            self.scored.refresh()
        if self._own:
            rate = self.lr * rate_at("cosine", self._share())
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        self.optimizer.zero_grad()
        loss = _checked(loss_fn(self.model, batch))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        self.passes += 1
        return float(loss.detach())

    def upper(self, batch: Any, loss_fn: LossOf, *, advance: bool = True) -> float:
        """The upper level alone: one step of the scores, and the mask that follows.

        Args:
            batch: for the scores.
            loss_fn: as in `step`.
            advance: whether it counts as an iteration of its own. Default True.
        """
        with self.scored.probing() as leaves:
            loss = _checked(loss_fn(self.model, batch))
            gradients = gradients_at(loss, leaves)
        # In `step` the lower level has counted this iteration already.
        share = self._share(0 if advance else 1)
        self.scored.learn(gradients, self.lr_mask * rate_at(self.schedule, share))
        self.done += advance
        self.passes += 1
        return float(loss.detach())

    def _share(self, back: int = 0) -> float:
        return 0.0 if self.steps is None else min(1.0, (self.done - back) / self.steps)

    def restart(self, keep: float | None = None, weights: dict[str, Tensor] | None = None, steps: int = 0) -> None:
        """Begin a new round: rank by magnitude what is kept, perhaps fewer of it, with fresh optimizers.

        Args:
            keep: share kept from now on. Default: as before.
            weights: values that the model's parameters and buffers get after that (a rewind), as a `state_dict` of the
                pruner's model. Default None: they stay.
            steps: iterations of the round. Default 0: as before.
        """
        self.scored.restart(keep)
        if weights is not None:
            self.model.load_state_dict(weights)
        self.done, self.steps = 0, steps or self.steps
        if self._own:
            self.optimizer = self._new_optimizer()

    def report(self) -> Report:
        """What is kept now."""
        return self.scored.report(self.passes)

    def finalize(self) -> Report:
        """Write m * theta into the weights, leave the model as it was built, and return what is kept."""
        found = self.report()
        self.scored.bake()
        return found


def _checked(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim:
        raise IntaglioError("loss_fn must return a scalar tensor")
    if not torch.isfinite(loss):
        raise IntaglioError(f"the loss is {float(loss.detach())}; lower the learning rates")
    return loss
