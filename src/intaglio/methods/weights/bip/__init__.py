"""BiP (Zhang et al., Advancing Model Pruning via Bi-level Optimization, NeurIPS 2022).

Weights theta and a binary mask m are learned in turn, as the two levels of one problem (section 3):

    upper: min over m of l(m * theta*(m)), m with a share k of ones
    lower: theta*(m) = argmin over theta of l(m * theta) + (gamma/2) ||theta||^2

With z = m * theta and g = dl/dz the lower optimum has m * g + gamma * theta = 0, so d theta*/dm = -(1/gamma) diag(g)
(the Hessian dropped), and the upper gradient is G = theta * g - (1/gamma) g * (m * g): one backward at z gives all.

- `layers`: prunable units: layers of any module, filters and channels, neurons and heads of a transformer.
- `masks`: the exact top-k.
- `scored`: scores, masks, and the upper gradient.
- here: `BiP`, a training modifier.

Where paper and released code differ: in the code, scores share the weights' storage, so that the two move together, and
the square of the scores' own gradient replaces g * (m * g). Here scores are a copy and the formula is the paper's;
`tied` and `implicit: released` follow the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Workload
from intaglio.methods.weights.bip.masked_model import (
    Implicit,
    MaskedModel,
    ScoreSchedule,
    score_gradients,
    score_rate,
    upper_gradient,
)
from intaglio.methods.weights.bip.masks import Scope, overlap
from intaglio.methods.weights.bip.prunable_units import Kind
from intaglio.trainer.protocols import Batch, Loss, ModifierSession, TrainingRun

__all__ = ["BiP", "MaskedModel", "overlap", "upper_gradient"]


class BiP(Method, slug="bip"):
    """Learn which weights to keep while they are retrained: a training modifier for any model.

        lower level: the step's own optimizer, on theta through z = m * theta
        upper level: s <- s - lr_mask sign(s) (theta * g - (1/gamma) g * (m * g)),  m = TopK(|s|),  g = dl/dz

    The scores s begin as a copy of the weights, so the first mask is that of magnitude; the sparsity is imposed at
    once. Between two optimizer steps the scores take a step of their own, on the first batch of the next optimizer
    step: the weights have not been trained on it yet, so the two levels use different batches, no data is held back and
    no batch needs to be saved for a resume. Each upper step costs one forward and backward pass of that batch. The run
    ends with a step of the weights. At the end m * theta is written into the weights: zeros, and nothing else.

    In a transformer the projections of the blocks are ranked against each other; embedding, head and norms stay dense.
    In any other module all linear layers and convolutions are ranked. Zeros of an earlier step stay zeros unless fewer
    zeros are requested: their scores and gradients are zero. The decay of the derivation's lower level
    (gamma/2 ||theta||^2) is the run's `weight_decay`; the paper's code sets it apart from gamma, too.

    `lr_mask: 0` keeps the first mask: one-shot magnitude with a global ranking, retrained, at one pass a step. The part
    `mask_overlap` of the training curve is the intersection over union with that first mask.

    Args:
        sparsity: share of zeros among the ranked weights, 0 <= sparsity < 1; the paper's 1 - k.
            Default 0.5.
        kind: single weights (`unstructured`, default), `neuron` (rows of an MLP's up and gate with the columns of its
            down projection) or `head` (rows of the queries with the columns of the output projection, and of keys and
            values where each head has its own), the same share in every block; of convolutional networks `filter`
            (outputs of a Conv2d) or `channel` (inputs of a Conv2d), the same share in every layer.
        scope: single weights are ranked over all layers (`global`, default) or within each (`layer`).
        gamma: of the lower level; the smaller, the larger the implicit term. Default 1.
        implicit: `true` (default): the upper step as above; `false`: without its second term, plain alternation;
            `released`: with the square of the score's own gradient instead, as in the released code.
        lr_mask: learning rate of the scores. Default 0.1.
        momentum: of the scores' SGD; they have no weight decay. Default 0.9.
        schedule: of `lr_mask` over the steps that learn: `step` (default; a tenth from 75 % on, a hundredth from 90 %
            on), `cosine` or `constant`.
        normalise: scale g of each weight so that its root mean square is that of the kept weights, as it is at the
            lower level's optimum for gamma = 1; without it gamma and `lr_mask` depend on the scale of the loss and of
            each layer. Default true.
        clip: instead of that, the largest norm of each weight's g. Default: any.
        every: optimizer steps between two upper steps. Default 1.
        until: share of the steps in which the mask is learned; afterwards it stands still. Default 1.
        guard: whether the global ranking may not empty a layer; a layer it would empty keeps its largest score, and
            the total stays exact. Default true.
        tied: whether the scores share the weights' storage, as in the released code by mistake. Default false.
        p: of the norm of |s| by which neurons and heads are ranked. Default 2.
        ignore: layers that stay dense, by name or shell pattern; parts of blocks (`layers.0.mlp`) for neurons and
            heads. Default: none.

    Raises:
        IntaglioError: (when training begins) the model has no such units, a weight is tied, frozen (under LoRA) or
            coarser than float32, or so few are kept that a layer would be empty; (while training) a score's gradient
            is not finite.

    Source: Zhang et al., Advancing Model Pruning via Bi-level Optimization, NeurIPS 2022, section 3; code
    OPTML-Group/BiP.
    """

    kinds = ("modifier",)
    summary = "learns which weights to keep during training, by alternating steps of weights and mask scores"
    citation = "Zhang et al., Advancing Model Pruning via Bi-level Optimization, NeurIPS 2022"
    url = "https://arxiv.org/abs/2210.04092"

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"linear_weights"})
    trains_weights: ClassVar[bool] = True

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    kind: Kind = "unstructured"
    scope: Scope = "global"
    gamma: Annotated[float, Field(gt=0)] = 1.0
    implicit: Implicit = True
    lr_mask: Annotated[float, Field(ge=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    schedule: ScoreSchedule = "step"
    normalise: bool = True
    clip: Annotated[float, Field(gt=0)] | None = None
    every: Annotated[int, Field(ge=1)] = 1
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    guard: bool = True
    tied: bool = False
    p: Annotated[float, Field(ge=1)] = 2.0
    ignore: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.clip is not None and self.normalise:
            raise ValueError("clip and normalise are given; one of them scales the gradient: set normalise: false")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the method without the scaling of g, which is for the layers of a transformer."""
        return cls(**{"normalise": False, **overrides})

    def attach(self, run: TrainingRun) -> ModifierSession:
        """Parametrize the weights and score them by magnitude."""
        if hasattr(run.model, "peft_config"):
            raise IntaglioError("bip retrains the weights that it masks, which lora keeps as they are; leave lora out")
        return _Session(self, run)

    def training_cost(self, workload: Workload, steps: float, batch_tokens: int, pass_flops: float) -> Cost:
        """Return the cost of the upper steps: a pass and a ranking of all weights each; scores, momentum and masks."""
        ranked = sum(rows * columns for rows, columns in workload.linears)
        upper = self.until * steps / self.every if self.lr_mask else 0.0
        # Masking, the gradient of the scores and their step take about as long as the ranking (measured on SmolLM2).
        return Cost(flops=upper * pass_flops, sorted_elements=(1 + 2 * upper) * ranked, extra_bytes=22 * ranked)


class _Session(ModifierSession):
    def __init__(self, method: BiP, run: TrainingRun) -> None:
        shared = {"kind", "scope", "gamma", "implicit", "normalise", "clip", "momentum", "tied", "guard", "p", "ignore"}
        self.method, self.run, self.overlap = method, run, 1.0
        self.masked = MaskedModel(run.model, method.sparsity, **method.model_dump(include=shared))

    def before_step(self, step: int, batch: Batch) -> None:
        method, learning = self.method, self.method.until * self.run.steps
        # After a lower step, and so never before the first.
        if method.lr_mask and 1 < step <= 1 + learning and (step - 1) % method.every == 0:
            with self.masked.gradient_probe() as leaves:
                loss = self.run.loss({name: value for name, value in batch.items() if name != "id"}).total
                gradients = score_gradients(loss, leaves)
            del leaves, loss
            _average(gradients)
            self.masked.learn(gradients, method.lr_mask * score_rate(method.schedule, (step - 2) / learning))
            self.overlap = overlap(self.masked.masks, self.masked.first)
        if method.tied:
            self.masked.refresh()

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss:
        return Loss(batch["id"].new_zeros((), dtype=torch.float32), {"mask_overlap": self.overlap})

    def state_dict(self) -> dict[str, Any]:
        return self.masked.state_dict() if self.method.lr_mask else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            self.masked.load_state_dict(state)
            self.overlap = overlap(self.masked.masks, self.masked.first)

    def detach(self) -> None:
        self.masked.bake()


def _average(gradients: dict[str, Tensor | None]) -> None:
    """Average over the processes of a run in place, so that all have the same mask."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for g in gradients.values():
            if g is not None:
                torch.distributed.all_reduce(g)
                g /= torch.distributed.get_world_size()
