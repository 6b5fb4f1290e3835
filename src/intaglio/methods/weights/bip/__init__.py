"""BiP (Zhang et al., Advancing Model Pruning via Bi-level Optimization, NeurIPS 2022).

Weights theta and a binary mask m are learned in turn, as the two levels of one problem (section 3):

    upper: min over m of l(m * theta*(m)), m with a share k of ones
    lower: theta*(m) = argmin over theta of l(m * theta) + (gamma/2) ||theta||^2

With z = m * theta and g = dl/dz the lower optimum has m * g + gamma * theta = 0, so d theta*/dm = -(1/gamma) diag(g)
(the Hessian dropped), and the upper gradient is G = theta * g - (1/gamma) g * (m * g): one backward at z gives all.

- `layers`: what is ranked: layers of any module, filters and channels, neurons and heads of a transformer.
- `masks`: the exact top-k.
- `scored`: scores, masks, and the upper gradient.
- `pruner`: `BilevelPruner`, for any module.
- `baselines`: `prune`, BiP beside one-shot and iterative magnitude pruning, HYDRA and plain alternation.
- here: `BiP`, the same as a shaper of a `train` step.

Where paper and released code part: the code lets scores share the weights' storage, so that the two move together, and
takes the square of the scores' own gradient for g * (m * g). Here scores are a copy and the formula is the paper's;
`tied` and `implicit: released` give the code's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Workload
from intaglio.methods.weights.bip.baselines import prune, rounds
from intaglio.methods.weights.bip.masks import overlap
from intaglio.methods.weights.bip.pruner import BilevelPruner, Losses
from intaglio.methods.weights.bip.scored import Report, Scored, gradients_at, rate_at, upper_gradient
from intaglio.trainer.protocols import Batch, Loss, TrainingRun

__all__ = ["BiP", "BilevelPruner", "Losses", "Report", "overlap", "prune", "rounds", "upper_gradient"]


class BiP(Method, slug="bip"):
    """Learns which weights of a language model to keep while a `train` step retrains them.

        lower level: the step's own optimizer, on theta through z = m * theta
        upper level: s <- s - lr_mask sign(s) (theta * g - (1/gamma) g * (m * g)),  m = TopK(|s|),  g = dl/dz

    The scores s begin as a copy of the weights, so the first mask is that of magnitude; the sparsity is imposed at
    once. Between two optimizer steps the scores take one of their own, on the first batch of the step to come: the
    weights have not been trained on it yet, so the two levels look at different batches, no data is held back and
    nothing of a batch has to be kept for a resume. Each upper step costs one forward and backward of that batch. The
    run ends with a step of the weights. At the end m * theta is written into the weights: zeros, and nothing else.

    The projections of the blocks are ranked, all against each other; embedding, head and norms stay dense. Zeros that
    an earlier step made stay zeros, as long as no fewer zeros are asked for: their scores and gradients are zero. The
    decay of the derivation's lower level (gamma/2 ||theta||^2) is the step's `weight_decay`, which the paper's code,
    too, sets apart from gamma.

    `lr_mask: 0` leaves the first mask: one-shot magnitude with a global ranking, retrained, at one pass a step. A
    part `mask_overlap` of the training curve is the intersection over union with that first mask.

    Args:
        sparsity: share of zeros among the ranked weights, 0 <= sparsity < 1; the paper's 1 - k.
            Default 0.5.
        kind: what goes: single weights (`unstructured`, default), `neuron` (rows of an MLP's up and gate with the
            columns of its down projection) or `head` (rows of the queries with the columns of the output projection,
            and of keys and values where each head has its own), the same share in every block.
        scope: single weights are ranked over all layers (`global`, default) or within each (`layer`).
        gamma: of the lower level; the smaller, the more the implicit term counts. Default 1.
        implicit: `true` (default): G as above; `false`: without its second term, plain alternation; `released`: the
            square of the score's own gradient in its place, as in the released code.
        lr_mask: learning rate of the scores. Default 0.1.
        momentum: of the scores' SGD; they have no weight decay. Default 0.9.
        schedule: of `lr_mask` over the steps that learn: `step` (default; a tenth from 75 % on, a hundredth from 90 %
            on), `cosine` or `constant`.
        normalise: scale g of each weight so that its root mean square is that of the kept weights, as it is at the
            lower level's optimum for gamma = 1; without it gamma and `lr_mask` depend on the scale of the loss and of
            each layer. Default true.
        clip: in place of that, the largest norm of each weight's g. Default: any.
        every: optimizer steps between two upper steps. Default 1.
        until: share of the steps in which the mask is learned; afterwards it stands still. Default 1.
        guard: whether the global ranking may not empty a layer; a layer it would empty keeps its largest score, and
            the total stays exact. Default true.
        tied: whether the scores share the weights' storage, as in the released code by mistake. Default false.
        p: of the norm of |s| by which neurons and heads are ranked. Default 2.
        ignore: layers left dense, by name or shell pattern; parts of blocks (`layers.0.mlp`) for neurons and heads.
            Default: none.

    Raises:
        IntaglioError: (when training begins) the model has no such units, a weight is tied, frozen (under LoRA) or
            coarser than float32, or so few are kept that a layer would be empty; (while training) a score's gradient
            is not finite.

    Source: Zhang et al., Advancing Model Pruning via Bi-level Optimization, NeurIPS 2022, section 3; code
    OPTML-Group/BiP.
    """

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"linear_weights"})
    trains_weights: ClassVar[bool] = True

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    kind: Literal["unstructured", "neuron", "head"] = "unstructured"
    scope: Literal["global", "layer"] = "global"
    gamma: Annotated[float, Field(gt=0)] = 1.0
    implicit: bool | Literal["released"] = True
    lr_mask: Annotated[float, Field(ge=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    schedule: Literal["step", "cosine", "constant"] = "step"
    normalise: bool = True
    clip: Annotated[float, Field(gt=0)] | None = None
    every: Annotated[int, Field(ge=1)] = 1
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    guard: bool = True
    tied: bool = False
    p: Annotated[float, Field(ge=1)] = 2.0
    ignore: list[str] = Field(default_factory=list)

    _scored: Scored | None = PrivateAttr(None)
    _run: TrainingRun | None = PrivateAttr(None)
    _overlap: float = PrivateAttr(1.0)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.clip is not None and self.normalise:
            raise ValueError("clip and normalise are given; one of them scales the gradient: set normalise: false")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Without the scaling of g, which is for the layers of a transformer.

        Args:
            overrides: fields that the caller sets.
        """
        return cls(**{"normalise": False, **overrides})

    def attach(self, run: TrainingRun) -> None:
        """Parametrize the weights and score them by magnitude.

        Args:
            run: whose model is trained.
        """
        if hasattr(run.checkpoint.model, "peft_config"):
            raise IntaglioError("bip retrains the weights that it masks, which lora keeps as they are; leave lora out")
        self._run, self._overlap = run, 1.0
        self._scored = Scored(
            run.checkpoint.model,
            1 - self.sparsity,
            kind=self.kind,
            scope=self.scope,
            gamma=self.gamma,
            implicit=self.implicit,
            normalise=self.normalise,
            clip=self.clip,
            momentum=self.momentum,
            tied=self.tied,
            guard=self.guard,
            p=self.p,
            ignore=self.ignore,
        )

    def before_step(self, t: int, next_batch: Batch) -> None:
        """Take an upper step on the batch to come, where one is due.

        Args:
            t: the optimizer step, from 1.
            next_batch: its first batch.
        """
        assert self._run is not None
        assert self._scored is not None  # attached
        scored, learning = self._scored, self.until * self._run.steps
        # After a lower step, and so never before the first.
        if self.lr_mask and 1 < t <= 1 + learning and (t - 1) % self.every == 0:
            with scored.probing() as leaves:
                loss = self._run.loss({name: value for name, value in next_batch.items() if name != "id"}).total
                gradients = gradients_at(loss, leaves)
            del leaves, loss
            _average(gradients)
            scored.learn(gradients, self.lr_mask * rate_at(self.schedule, (t - 2) / learning))
            self._overlap = overlap(scored.masks, scored.first)
        if self.tied:
            scored.refresh()

    def on_step(self, t: int) -> None:
        """Do nothing."""

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss:
        """Add nothing, and tell how far the mask has moved.

        Args:
            model: not looked at.
            batch: not looked at.
            outputs: not looked at.
        """
        return Loss(batch["id"].new_zeros((), dtype=torch.float32), {"mask_overlap": self._overlap})

    def param_groups(self) -> list[dict[str, Any]]:
        """Return none: the scores have an optimizer of their own."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Scores and their momentum; nothing where the mask does not move."""
        assert self._scored is not None
        return self._scored.state_dict() if self.lr_mask else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back, and rank.

        Args:
            state: from `state_dict`.
        """
        if state:
            assert self._scored is not None
            self._scored.load_state_dict(state)
            self._overlap = overlap(self._scored.masks, self._scored.first)

    def detach(self, run: TrainingRun) -> None:
        """Write m * theta into the weights.

        Args:
            run: whose model was trained.
        """
        if self._scored is not None:
            self._scored.bake()
        self._scored = self._run = None

    def training_cost(self, workload: Workload, steps: float, batch_tokens: int, pass_flops: float) -> Cost:
        """A pass and a ranking of all weights for each upper step; scores, momentum, masks and the copies of a ranking.

        Args:
            workload: of the model.
            steps: optimizer steps.
            batch_tokens: of a batch; not looked at.
            pass_flops: of a forward and backward.
        """
        ranked = sum(rows * columns for rows, columns in workload.linears)
        upper = self.until * steps / self.every if self.lr_mask else 0.0
        # Masking, the gradient of the scores and their step take about as long as the ranking (measured on SmolLM2).
        return Cost(flops=upper * pass_flops, sorted_elements=(1 + 2 * upper) * ranked, extra_bytes=22 * ranked)


def _average(gradients: dict[str, Tensor | None]) -> None:
    """The mean over the processes of a run, so that all have the same mask."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for g in gradients.values():
            if g is not None:
                torch.distributed.all_reduce(g)
                g /= torch.distributed.get_world_size()
