"""ProgressiveNM (Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training, CPAL 2025).

N:M zeros that come by degrees while a model is trained, in place of a pattern that is full from the first step on.

- here: ProgressiveNM, a shaper of a `train` step.
- `sparsifier`: NMSparsifier, the same in a loop of your own, for any module.
- `schedule`: the recipes as functions of the step, and what a step's products need.
- `parametrization`: a weight under its mask, and which weights the gradient reaches.
- `masks`: which weights are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import nn
from torch.distributed.tensor import DTensor

from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Method, ModelAspect
from intaglio.methods.weights.progressive_nm.masks import keep_mask
from intaglio.methods.weights.progressive_nm.parametrization import Part
from intaglio.methods.weights.progressive_nm.schedule import FINETUNE, STRAIGHT, Gradient, Moment, Recipe, Schedule
from intaglio.methods.weights.progressive_nm.sparsifier import (
    LAMBDA,
    Along,
    Layer,
    NMSparsifier,
    ProgressiveWeights,
    check_size,
    straight_through,
)
from intaglio.methods.weights.sparsity_target import SparsityTarget, parse_pattern
from intaglio.modeling.anatomy import Anatomy, Linear, anatomy
from intaglio.trainer.protocols import Batch, Loss, TrainingRun

__all__ = ["Moment", "NMSparsifier", "ProgressiveNM", "Schedule", "keep_mask"]

Target = Literal["mlp", "q", "k", "v", "o"]
PAPER_DECAY = {"mdgf-linear": 8e-4}
"""c a step, as shipped with the paper's code; 1e-4 for the exponential."""


class ProgressiveNM(SparsityTarget, Method, slug="progressive_nm"):
    """Train with N:M zeros that come by degrees: a shaper of a `train` step.

        W~ = W * (m + z(t) (1 - m))

    m keeps the N largest |w| of every M consecutive inputs and is taken anew from the dense weights W in every pass; z
    falls from 1 to 0 (MdGf), or z is 0 and the pattern itself is tightened in frames (SdGf). With `mdgf-linear`, z =
    max(1 - c k, 0), with `mdgf-exp`, z = exp(-c k), k steps after a short dense phase; fine-tuning at the end has the
    final pattern and a binary mask. Frames between the dense phase and fine-tuning, in equal parts:
    `sdgf-stepwise` (M-1):M, M/2:M, M/4:M ... N:M; `sdgf-geometric` 8N:8M, 4N:4M, 2N:2M, N:M; `sdgf-densify` N:8M, N:4M,
    N:2M, N:M; `custom` as given. `ste` and `sr-ste` are the baselines: the final pattern from the first step on.

    Under the gradient `chain` a pruned weight is given z times the gradient, so none where z is 0, as the paper
    describes its mechanism; under `ste` it is given all of it, as its code has it. Once a weight gets no gradient,
    AdamW's momentum still moves it for some steps (`masked_momentum` stops that) and weight decay goes on shrinking it;
    neither changes the model, as long as it stays pruned.

    In a recipe: `train: {shape: [{progressive_nm: {pattern: "1:8"}}], steps: 500}`, with any objective. Biases, norms,
    embeddings and the head stay dense. While evaluating, the model is the sparse one that would be baked at that step.
    At the end the zeros are plain tensors of a stock checkpoint. Zeros that an earlier step made are not held. The loss
    has three parts more: `z`, `sparsity` (of the forward pass) and, under AdamW, `second moment where pruned`, the mean
    square of the gradients at pruned weights, taken a hundred times a run.

    Departures from the authors' code: biases are kept (it drops them); phases and frames are ranges of steps (it
    compares epochs, and loses its place when it is resumed); the final pattern has a frame of its own; M has to divide
    the width, so that no group straddles two rows.

    Args:
        pattern: `N:M`, keep N of every M consecutive inputs: `1:8` keeps one of eight. Give this or `sparsity`.
        sparsity: share of zeros in each layer as a whole, in the place of a pattern; for mdgf, ste and sr-ste.
        ignore: layers that stay dense, by name or shell pattern. Default: none.
        recipe: how the zeros come. Default `mdgf-exp`.
        targets: which projections: `mlp`, and of the attention `q`, `k`, `v`, `o`. Default `[mlp]`.
        attention: a pattern of its own for the attention's targets, as `1:8` beside an mlp of 1:32. Default: the same.
        dense: share of the steps before anything is pruned. Default: 0.05; none for ste and sr-ste.
        finetune: share of the steps at the end with the final pattern and a binary mask. Default 0.25.
        decay: c, by which z falls each step. Default: such that z is 0 (linear) or 0.01 (exponential) where fine-tuning
            begins, whatever the number of steps.
        gradient: `chain` or `ste`; ste and sr-ste are straight-through whatever is said. Default `chain`.
        sr_decay: lambda, by which sr-ste pulls pruned weights to zero. Default 2e-4.
        custom: frames of the recipe `custom`, `{start: N:M}`: a start with a point is a share of the steps, one without
            a step; dense before the first. Default: none.
        along: whether groups run along the `inputs` of a projection or its `outputs`. Default `inputs`.
        masked_momentum: whether the optimizer's momentum is forgotten at pruned weights once z is 0 and the gradient is
            `chain`. Default False.

    Raises:
        IntaglioError: (when a run begins) a pattern does not fit a width, no layer is left, or a layer is frozen.

    Source: Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers, CPAL 2025
    (section 3); SR-STE from Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, ICLR
    2021.
    """

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"linear_weights"})
    trains_weights: ClassVar[bool] = True

    recipe: Recipe = "mdgf-exp"
    targets: list[Target] = Field(["mlp"], min_length=1)
    attention: str | None = None
    dense: Annotated[float, Field(ge=0, le=1)] | None = None
    finetune: Annotated[float, Field(ge=0, le=1)] = FINETUNE
    decay: Annotated[float, Field(ge=0)] | None = None
    gradient: Gradient = "chain"
    sr_decay: Annotated[float, Field(ge=0)] = LAMBDA
    custom: dict[str, str] | None = None
    along: Along = "inputs"
    masked_momentum: bool = False

    _weights: ProgressiveWeights | None = PrivateAttr(None)
    _optimizer: Any = PrivateAttr(None)
    _run: TrainingRun | None = PrivateAttr(None)
    _second_moment: float | None = PrivateAttr(None)

    @field_validator("custom", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        """Python's own numbers as starts."""
        return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.attention is not None:
            parse_pattern(self.attention)
            if not set(self.targets) - {"mlp"}:
                raise ValueError(f"attention is {self.attention!r}, but targets has none of q, k, v and o")
            if self.recipe == "custom":
                raise ValueError(
                    "attention has a pattern of its own, which the frames of custom do not have; leave it out"
                )
        try:
            for amount in self._amounts():
                self.schedule(1, amount)
        except IntaglioError as error:
            raise ValueError(str(error)) from None
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """The constants that the paper's code ships for ViT-Base (Swin for mdgf-linear): c a step, no dense phase, no
        fine-tuning, straight-through gradients; 1:32 where no amount is given.

        Args:
            overrides: fields that the caller sets.
        """
        decay = PAPER_DECAY.get(overrides.get("recipe", "mdgf-exp"), 1e-4)
        given = {"decay": decay, "dense": 0.0, "finetune": 0.0, "gradient": "ste", **overrides}
        return cls(**({} if {"pattern", "sparsity"} & given.keys() else {"pattern": "1:32"}) | given)

    def _amounts(self) -> list[Any]:
        return [self.amount, *([] if self.attention is None else [parse_pattern(self.attention)])]

    def schedule(self, steps: int, amount: Any = None) -> Schedule:
        """The recipe over a run.

        Args:
            steps: of the run.
            amount: the final one. Default: that of the fields.
        """
        frames = {_start(start): parse_pattern(pattern) for start, pattern in (self.custom or {}).items()}
        wanted = self.amount if amount is None else amount
        return Schedule(wanted, steps, self.recipe, self.dense, self.finetune, self.decay, frames)

    def chosen(self, parts: Anatomy) -> list[tuple[str, Linear]]:
        """The projections that are pruned, in order.

        Args:
            parts: of the model.

        Raises:
            IntaglioError: `ignore` names no layer, or nothing is left.
        """
        named = [(name, linear) for name, linear in parts.all_linears() if _target(linear) in self.targets]
        if not named:
            raise IntaglioError(f"targets is {self.targets}; this model has no such projections")
        left = {name for name, _, _ in self.taken([(name, *linear.shape) for name, linear in named])}
        return [(name, linear) for name, linear in named if name in left]

    def check_model(self, parts: Anatomy) -> None:
        """Refuse a model whose widths the patterns do not fit.

        Args:
            parts: of the model.

        Raises:
            IntaglioError: names the layer.
        """
        for name, linear in self.chosen(parts):
            check_size(name, linear.shape[1 if self.along == "inputs" else 0], self._of(linear, 1), self.along)

    def _of(self, linear: Linear, steps: int) -> Schedule:
        own = self.attention is not None and linear.part == "attention"
        return self.schedule(steps, self._amounts()[-1] if own else None)

    def layers(self, parts: Anatomy, steps: int) -> list[Layer]:
        """What is pruned by which schedule, a layer that holds several projections once.

        Args:
            parts: of the model.
            steps: of the run.
        """
        owned: dict[int, list[tuple[str, Linear]]] = {}
        for name, linear in self.chosen(parts):
            owned.setdefault(id(linear.module), []).append((name, linear))
        return [
            Layer(
                found[0][0].partition("[")[0],
                found[0][1].module,
                tuple(Part(self._of(linear, steps), linear.rows) for _, linear in found),
            )
            for found in owned.values()
        ]

    def attach(self, run: TrainingRun) -> None:
        """Put the masks over the weights.

        Args:
            run: whose model is trained.

        Raises:
            IntaglioError: as the class, or LoRA is used.
        """
        if hasattr(run.checkpoint.model, "peft_config"):
            raise IntaglioError(FROZEN)
        parts = anatomy(run.checkpoint.model)
        self.check_model(parts)
        layers = self.layers(parts, run.steps)
        for layer in layers:
            if not layer.module.weight.requires_grad:
                raise IntaglioError(f"{layer.name} is frozen; {FROZEN}")
        gradient, pull = straight_through(self.recipe, self.gradient, self.sr_decay)
        # Each batch of a step adds lambda once, and the step is to have it once.
        self._weights = ProgressiveWeights(layers, self.along, gradient, pull / run.accumulate)
        self._run, self._second_moment = run, None

    def before_step(self, t: int, next_batch: Batch) -> None:
        """Move to step `t`.

        Args:
            t: from 1.
            next_batch: not looked at.
        """
        weights, run = self._hung
        weights.set(t)
        if any(isinstance(weight, DTensor) for _, weight, _ in weights.items()):
            if self.masked_momentum:
                raise IntaglioError("masked_momentum needs whole weights, and FSDP has cut them up; leave it out")
            return
        if run.optimizer is None:
            return
        if self.masked_momentum and weights.now.z == 0 and self.gradient == "chain" and self.recipe not in STRAIGHT:
            weights.mask_momentum(run.optimizer)
        if (t - 1) % max(1, run.steps // 100) == 0:
            self._second_moment = weights.pruned_moment(run.optimizer)

    @property
    def _hung(self) -> tuple[ProgressiveWeights, TrainingRun]:
        if self._weights is None or self._run is None:
            raise IntaglioError("progressive_nm is not attached to a run")
        return self._weights, self._run

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss:
        """Add nothing to the loss, and three numbers to its parts.

        Args:
            model: that is trained.
            batch: not looked at.
            outputs: not looked at.
        """
        now = self._hung[0].now
        device = next(weight for _, weight, _ in self._hung[0].items()).device
        parts = {"z": now.z, "sparsity": self._hung[0].zeros}
        if self._second_moment is not None:
            parts["second moment where pruned"] = self._second_moment
        return Loss(torch.zeros((), device=device), parts)

    def on_step(self, t: int) -> None:
        """Do nothing: the masks are taken from the weights in every pass."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Return none."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return the second moment that is logged; all else follows from the step and the weights."""
        return {"second moment": self._second_moment}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back.

        Args:
            state: from `state_dict`.
        """
        self._second_moment = state["second moment"]

    def detach(self, run: TrainingRun) -> None:
        """Burn the final mask in.

        Args:
            run: whose model was trained.
        """
        if self._weights is not None:
            self._weights.bake()
        self._weights = self._run = None


FROZEN = (
    "progressive_nm trains whole weights, which lora and freeze hold still: leave them out, or prune first and train"
    " adapters on what is left"
)


def _target(linear: Linear) -> Target:
    if linear.part == "mlp":
        return "mlp"
    roles: dict[str, Target] = {"q": "q", "k": "k", "v": "v"}
    return roles.get(linear.role, "o")


def _start(word: str) -> float:
    """A start of a frame: a share below 1, or a whole step."""
    if not re.fullmatch(r"[0-9]{1,9}|0\.[0-9]{1,9}", word):
        raise ValueError(
            f"custom has the start {word!r}; a share below 1 such as 0.25, or a step such as 100, is accepted"
        )
    return float(word)
