"""ProgressiveNM (Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training, CPAL 2025).

N:M sparsity that is introduced gradually while a model is trained, instead of the full pattern from the first step.

- here: `ProgressiveNM`, a training modifier.
- `schedule`: the recipes as functions of the step, and the operations of a step.
- `sparsifier`: the masked weights of a model.
- `parametrization`: one weight under its mask, and its gradient.
- `masks`: N:M masks by magnitude.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Method, ModelAspect
from intaglio.methods.weights.progressive_nm.masked_weights import (
    LAMBDA,
    Along,
    MaskedWeights,
    PrunedLayer,
    check_size,
    straight_through,
)
from intaglio.methods.weights.progressive_nm.masks import keep_mask
from intaglio.methods.weights.progressive_nm.parametrization import Part
from intaglio.methods.weights.progressive_nm.schedule import FINETUNE, Gradient, Moment, Recipe, Schedule
from intaglio.methods.weights.prunable_layers import prunable_layers
from intaglio.methods.weights.sparsity_target import SparsityTarget, parse_pattern
from intaglio.modeling.anatomy import Anatomy, Linear, anatomy
from intaglio.trainer.protocols import Batch, Loss, ModifierSession, TrainingRun

__all__ = ["Moment", "ProgressiveNM", "Schedule", "keep_mask"]

Target = Literal["mlp", "q", "k", "v", "o"]
PAPER_DECAY = {"mdgf-linear": 8e-4}
"""c a step, as shipped with the paper's code; 1e-4 for the exponential."""
FROZEN = (
    "progressive_nm trains whole weights, which lora and freeze hold still: leave them out, or prune first and train"
    " adapters on what is left"
)


class ProgressiveNM(SparsityTarget, Method, slug="progressive_nm"):
    """Train with N:M zeros that are introduced gradually: a training modifier for any model.

        W~ = W * (m + z(t) (1 - m))

    m keeps the N largest |w| of every M consecutive inputs and is recomputed from the dense weights W in every pass; z
    falls from 1 to 0 (MdGf), or z is 0 and the pattern itself is tightened in frames (SdGf). With `mdgf-linear`, z =
    max(1 - c k, 0), with `mdgf-exp`, z = exp(-c k), k steps after a short dense phase; fine-tuning at the end has the
    final pattern and a binary mask. Frames between the dense phase and fine-tuning, in equal parts:
    `sdgf-stepwise` (M-1):M, M/2:M, M/4:M ... N:M; `sdgf-geometric` 8N:8M, 4N:4M, 2N:2M, N:M; `sdgf-densify` N:8M, N:4M,
    N:2M, N:M; `custom` as given. `ste` and `sr-ste` are the baselines: the final pattern from the first step on.

    Under the gradient `chain` a pruned weight gets z times the gradient, so none where z is 0, as the paper describes
    its mechanism; under `ste` it gets all of it, as in the paper's code. Once a weight gets no gradient, AdamW's
    momentum still moves it for some steps (`masked_momentum` stops that) and weight decay still shrinks it; neither
    changes the model as long as the weight stays pruned.

    In a recipe: `train: {modifiers: [{progressive_nm: {pattern: "1:8"}}], steps: 500}`, with any objective. Biases,
    norms, embeddings and the head of a transformer stay dense; in any other module all linear layers and convolutions
    are pruned. While evaluating, the model is the sparse one that would be baked at that step. At the end the zeros are
    plain tensors of a stock checkpoint. Zeros of an earlier step are not preserved. The loss has three more parts: `z`,
    `sparsity` (of the forward pass) and, under AdamW, `second moment where pruned`, the mean square of the gradients at
    pruned weights, taken a hundred times a run.

    Departures from the authors' code: biases are kept (it drops them); phases and frames are ranges of steps (it
    compares epochs, and loses its place when it is resumed); the final pattern has a frame of its own; M must divide
    the width, so that no group straddles two rows.

    Args:
        pattern: `N:M`, keep N of every M consecutive inputs: `1:8` keeps one of eight. Give this or `sparsity`.
        sparsity: instead of a pattern, the share of zeros in each layer as a whole; for mdgf, ste and sr-ste.
        ignore: layers that stay dense, by name or shell pattern. Default: none.
        recipe: how the zeros are introduced. Default `mdgf-exp`.
        targets: which projections of a transformer: `mlp`, and of the attention `q`, `k`, `v`, `o`. Default `[mlp]`.
        attention: a pattern of its own for the attention's targets, as `1:8` beside an mlp of 1:32. Default: the same.
        dense: share of the steps before anything is pruned. Default: 0.05; none for ste and sr-ste.
        finetune: share of the steps at the end with the final pattern and a binary mask. Default 0.25.
        decay: c, by which z falls each step. Default: such that z is 0 (linear) or 0.01 (exponential) where fine-tuning
            begins, whatever the number of steps.
        gradient: `chain` or `ste`; the recipes ste and sr-ste are always straight-through. Default `chain`.
        sr_decay: lambda, by which sr-ste pulls pruned weights to zero. Default 2e-4.
        custom: frames of the recipe `custom`, `{start: N:M}`: a start with a point is a share of the steps, one without
            a step; dense before the first. Default: none.
        along: whether groups run along the `inputs` of a projection or its `outputs`. Default `inputs`.
        masked_momentum: whether the optimizer's momentum is reset at pruned weights once z is 0 and the gradient is
            `chain`. Default False.

    Raises:
        IntaglioError: (when a run begins) a pattern does not fit a width, no layer is left, or a layer is frozen.

    Source: Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers, CPAL 2025
    (section 3); SR-STE from Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, ICLR
    2021.
    """

    kinds = ("modifier",)
    summary = "trains with N:M sparsity that increases gradually: pruned weights decay, or the pattern tightens"
    citation = (
        "Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers, CPAL 2025"
    )
    url = "https://arxiv.org/abs/2402.04744"

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

    @field_validator("custom", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        """Accept Python numbers as starts."""
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
        """Return the constants that the paper's code ships for ViT-Base (Swin for mdgf-linear).

        These are c a step, no dense phase, no fine-tuning, straight-through gradients; 1:32 where no amount is given.
        """
        decay = PAPER_DECAY.get(overrides.get("recipe", "mdgf-exp"), 1e-4)
        given = {"decay": decay, "dense": 0.0, "finetune": 0.0, "gradient": "ste", **overrides}
        return cls(**({} if {"pattern", "sparsity"} & given.keys() else {"pattern": "1:32"}) | given)

    def _amounts(self) -> list[Any]:
        return [self.amount, *([] if self.attention is None else [parse_pattern(self.attention)])]

    def schedule(self, steps: int, amount: Any = None) -> Schedule:
        """Return the recipe over a run of `steps`, for the amount of the fields by default."""
        frames = {_start(start): parse_pattern(pattern) for start, pattern in (self.custom or {}).items()}
        wanted = self.amount if amount is None else amount
        return Schedule(wanted, steps, self.recipe, self.dense, self.finetune, self.decay, frames)

    def chosen(self, parts: Anatomy) -> list[tuple[str, Linear]]:
        """Return the pruned projections of a transformer, in order."""
        named = [(name, linear) for name, linear in parts.all_linears() if _target(linear) in self.targets]
        if not named:
            raise IntaglioError(f"targets is {self.targets}; this model has no such projections")
        left = {name for name, _, _ in self.taken([(name, *linear.shape) for name, linear in named])}
        return [(name, linear) for name, linear in named if name in left]

    def check_model(self, parts: Anatomy) -> None:
        """Refuse a model whose widths the patterns do not fit."""
        for name, linear in self.chosen(parts):
            check_size(name, linear.shape[1 if self.along == "inputs" else 0], self._schedule_of(linear, 1), self.along)

    def _schedule_of(self, linear: Linear, steps: int) -> Schedule:
        own = self.attention is not None and linear.part == "attention"
        return self.schedule(steps, self._amounts()[-1] if own else None)

    def layers(self, parts: Anatomy, steps: int) -> list[PrunedLayer]:
        """Return the pruned layers of a transformer with their schedules; a fused layer appears once."""
        owned: dict[int, list[tuple[str, Linear]]] = {}
        for name, linear in self.chosen(parts):
            owned.setdefault(id(linear.module), []).append((name, linear))
        return [
            PrunedLayer(
                projections[0][0].partition("[")[0],
                projections[0][1].module,
                tuple(Part(self._schedule_of(linear, steps), linear.rows) for _, linear in projections),
            )
            for projections in owned.values()
        ]

    def _plain_layers(self, model: nn.Module, steps: int) -> list[PrunedLayer]:
        if self.targets != ["mlp"]:
            raise IntaglioError(f"targets is {self.targets}, which is for transformers, not {type(model).__name__}")
        part = Part(self.schedule(steps))
        return [PrunedLayer(name, module, (part,)) for name, module in prunable_layers(model, self.ignore)]

    def attach(self, run: TrainingRun) -> ModifierSession:
        """Put the masks over the weights."""
        if hasattr(run.model, "peft_config"):
            raise IntaglioError(FROZEN)
        if isinstance(run.model, PreTrainedModel):
            parts = anatomy(run.model)
            self.check_model(parts)
            layers = self.layers(parts, run.steps)
        else:
            layers = self._plain_layers(run.model, run.steps)
        for layer in layers:
            if not layer.module.weight.requires_grad:
                raise IntaglioError(f"{layer.name} is frozen; {FROZEN}")
        return _Session(self, run, layers)


class _Session(ModifierSession):
    def __init__(self, method: ProgressiveNM, run: TrainingRun, layers: list[PrunedLayer]) -> None:
        self.method, self.run = method, run
        self.second_moment: float | None = None
        gradient, pull = straight_through(method.recipe, method.gradient, method.sr_decay)
        # Each batch of a step adds lambda once, and the step is to have it once.
        self.weights = MaskedWeights(layers, method.along, gradient, pull / run.gradient_accumulation_steps)
        self.resets_momentum = method.masked_momentum and gradient == "chain"

    def before_step(self, step: int, batch: Batch) -> None:
        weights, run = self.weights, self.run
        weights.set(step)
        if any(isinstance(weight, DTensor) for _, weight, _ in weights.items()):
            if self.method.masked_momentum:
                raise IntaglioError("masked_momentum needs whole weights, and FSDP has sharded them; leave it out")
            return
        if run.optimizer is None:
            return
        if self.resets_momentum and weights.now.z == 0:
            weights.mask_momentum(run.optimizer)
        if (step - 1) % max(1, run.steps // 100) == 0:
            self.second_moment = weights.pruned_moment(run.optimizer)

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss:
        parts = {"z": self.weights.now.z, "sparsity": self.weights.zeros}
        if self.second_moment is not None:
            parts["second moment where pruned"] = self.second_moment
        return Loss(batch["id"].new_zeros((), dtype=torch.float32), parts)

    def state_dict(self) -> dict[str, Any]:
        # All else follows from the step and the weights.
        return {"second moment": self.second_moment}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.second_moment = state["second moment"]

    def detach(self) -> None:
        self.weights.bake()


def _target(linear: Linear) -> Target:
    if linear.part == "mlp":
        return "mlp"
    roles: dict[str, Target] = {"q": "q", "k": "k", "v": "v"}
    return roles.get(linear.role, "o")


def _start(word: str) -> float:
    """Parse the start of a frame: a share below 1, or a whole step."""
    if not re.fullmatch(r"[0-9]{1,9}|0\.[0-9]{1,9}", word):
        raise ValueError(
            f"custom has the start {word!r}; a share below 1 such as 0.25, or a step such as 100, is accepted"
        )
    return float(word)
