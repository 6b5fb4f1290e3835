"""LOST (Li et al., LOST: Low-rank and Sparse Pre-training for Large Language Models, 2025).

- `linear`: what stands in the place of a projection.
- `start`: what its parts begin as, from one singular value decomposition.
- `sizes`: ranks, columns, exact counts.
- `replace`: projections of a model replaced, rebuilt empty, merged back.
- `gradient`: scores of columns by the gradient of the loss.

The paper's body and the code that its abstract names could not be had: mechanism and defaults are those of scripts that
look like the authors' own, checked against what the paper's public reviews quote. Those scripts copy the left vectors
of the weight into the factor that meets the input, which fits square layers alone; here each factor gets the vectors of
its own side.

Dimension letters: I inputs, O outputs, R rank, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.calibration import as_segments
from intaglio.errors import IntaglioError
from intaglio.masks import predicts_next
from intaglio.methods.base import Capability, Cost, Depends, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.methods.weights.lost.gradient import column_gradients
from intaglio.methods.weights.lost.linear import Activation, ElementsLinear, Form, LostLinear
from intaglio.methods.weights.lost.replace import Start, freeze, merge, summary
from intaglio.methods.weights.lost.sizes import COLUMNS, COMPLEMENT_SHARE, Sizes, Wanted
from intaglio.methods.weights.lost.start import By, Init
from intaglio.methods.weights.one_shot import LENGTH, SAMPLES, describe
from intaglio.modeling.anatomy import Anatomy, Linear, anatomy
from intaglio.modeling.replacement import ReplacedLinear, replace_modules
from intaglio.modeling.targets import check_patterns, plan_replacements, select_layers

Number = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)]
Rank = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]
Scale = Annotated[float, Field(ge=0)]

SVD_FLOPS = 22
"""Operations of a thin decomposition over (the narrower side)² · (the wider side)."""


_PLAIN: frozenset[Capability] = frozenset({"linear_weights"})
_MATRIX: frozenset[Capability] = frozenset({"matrix_products"})
_NOTHING: frozenset[Capability] = frozenset()


def _is_amount(value: Any, least: int) -> bool:
    """Whether it is a number of at least `least`, or a share up to 1 (above 0 where `least` is)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value >= least if isinstance(value, int) else 0 <= value <= 1 and (value > 0 or not least)


class LOST(Method, slug="lost"):
    """Replaces each projection by a low-rank pair and a few whole columns, which are trained in its place.

    From the weight W0 [O, I] that is there, mostly a random one, with W0 = U diag(S) Vᵀ:

        B = U_r √S_r [O, r],  A = √S_r V_rᵀ [r, I]
        W_comp = the sum of the singular triples r .. r + k - 1
        I = the c columns of W_comp with the largest norms, Ws = W0[:, I] [O, c]
        y = γ act(x Aᵀ) Bᵀ + (1 - γ) x[I] Wsᵀ + bias

    W0 is gone then: weights, gradients and the optimizer's moments are those of r (I + O) + c O numbers a projection in
    the place of I O. Embeddings, norms and the head stay dense. The set I stays as it is; a `train` step behind this
    one trains A, B and Ws. γ and 1 - γ shrink both parts below what W0 gave, and nothing makes up for that. Weight
    decay on A and B is no decay on BA. Fused projections are taken apart, each with factors of its own.

    The checkpoint becomes a live one (`intaglio.load` reads it). Without an activation between the factors the parts
    are one matrix: `LOST(merge=True)`, or `lost: {merge: true}` behind the training, puts stock layers with that matrix
    back, and the checkpoint is a plain one again.

    What the method is held against has the same interface: `LOST.low_rank()`, `LOST.cola()`, `LOST.sltrain()`, and
    `columns_by: random`.

    Source: Li et al., LOST: Low-rank and Sparse Pre-training for Large Language Models, 2025 (arXiv 2508.02668); see
    the module for what was read. CoLA: Liu et al., CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank
    Activation, 2025. SLTrain: Han et al., SLTrain: a sparse plus low-rank approach for parameter and memory efficient
    pretraining, NeurIPS 2024.

    Args:
        rank: r, a number or a share (a fraction such as 0.25) of the model's width; or either by shell patterns of the
            projections' names, the first that fits counts (`{"*.mlp.*": 48, "*": 0.25}`). Cut to a projection's
            narrower side. Default: a quarter of the width, as 128 of 512 in the paper's smallest model.
        columns: c, a number or a share δ of a projection's inputs (then at least 1); 0: none. Default 0.05; none where
            `elements` is given.
        elements: in the place of columns, single weights at random places (SLTrain), a number or a share of the
            projection's. Default 0.
        gamma: γ, of the low-rank part, while the sparse part has 1 - γ; or both scales, `[low, sparse]`. Default 0.7.
        complement_rank: k, triples of the complement, cut to what is left. Default: half of the width, as 256 of 512.
        activation: between the factors, `silu` (default) or `identity`.
        columns_by: norms of the complement's columns, `l2` (default) or `l1`; `random`; or `gradient`, the norm of the
            columns of the loss's gradient over the calibration texts.
        inverse: whether the complement is made of the k smallest triples. Default False.
        column_values: where Ws comes from, the `weight` (default) or the `complement`.
        init: of the pair, `svd` (default); `cola`, normal with standard deviation r^(-1/4) (I + O)^(-1/4); `kaiming`,
            both factors as `nn.Linear` is drawn; or `zero`, A so and B zero.
        targets: projections that are replaced, by name or shell pattern. Default: all of the blocks.
        ignore: projections that stay as they are, likewise. Default: none.
        budget: in the place of a rank, the share of a projection's numbers that its parts may have together: gives the
            largest rank that fits.
        within_rank: whether the sparse part is paid for out of the rank, so that no projection has more numbers than
            the pair of `rank` alone. Default False.
        adapter: whether W0 stays, frozen, and the parts are added to it: y = W0 x + bias + (α / r) (the parts). All
            else is frozen too. It is no LoRA: W0's own directions begin in the parts, so the function changes at once.
            Default False.
        alpha: α of an adapter. Default 1.
        merge: whether this step puts stock layers back, in the place of all the above. Default False.

    Raises:
        IntaglioError: a name fits no projection, parts of a fused module are torn apart, nothing is left for a rank, a
            rank is above what every projection has, a gradient is asked of a model that predicts no next token, or
            there is nothing that can be merged.
    """

    storage: ClassVar[Literal["runtime"]] = "runtime"
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    needs_calibration: ClassVar[bool] = cast(
        bool, Depends(False, lambda step: step.columns_by == "gradient" and not step.merge)
    )
    # A step that merges needs the parts to be matrices, and gives back what the step that replaced did away with.
    requires: ClassVar[frozenset[Capability]] = cast(
        frozenset[Capability], Depends(_PLAIN, lambda step: _MATRIX if step.merge else _PLAIN)
    )
    invalidates: ClassVar[frozenset[Capability]] = cast(
        frozenset[Capability],
        Depends(
            _PLAIN,
            lambda step: _NOTHING if step.merge else _PLAIN if step.activation == "identity" else _PLAIN | _MATRIX,
        ),
    )
    restores: ClassVar[frozenset[Capability]] = cast(
        frozenset[Capability], Depends(_NOTHING, lambda step: _PLAIN if step.merge else _NOTHING)
    )

    rank: Rank | dict[str, Rank] | None = None
    columns: Number | None = None
    elements: Number = 0
    gamma: Annotated[float, Field(ge=0, le=1)] | Annotated[list[Scale], Field(min_length=2, max_length=2)] = 0.7
    complement_rank: Annotated[int, Field(ge=1)] | None = None
    activation: Activation = "silu"
    columns_by: By = "l2"
    inverse: bool = False
    column_values: Literal["weight", "complement"] = "weight"
    init: Init = "svd"
    targets: list[str] | None = None
    ignore: list[str] = Field(default_factory=list)
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    within_rank: bool = False
    adapter: bool = False
    alpha: Annotated[float, Field(gt=0)] = 1.0
    merge: bool = False

    # In one sentence each: of a field that takes several types pydantic tells what is wrong with each of them.
    @field_validator("rank", mode="before")
    @classmethod
    def _rank(cls, value: Any) -> Any:
        for one in value.values() if isinstance(value, dict) else [] if value is None else [value]:
            if not _is_amount(one, least=1):
                raise ValueError(f"{one!r} is no rank; a number of at least 1 or a share above 0.0 and up to 1.0 is")
        return value

    @field_validator("columns", "elements", mode="before")
    @classmethod
    def _amount(cls, value: Any) -> Any:
        if value is not None and not _is_amount(value, least=0):
            raise ValueError(f"{value!r} is no amount; a number of at least 0 or a share from 0.0 to 1.0 is")
        return value

    @field_validator("gamma", mode="before")
    @classmethod
    def _gamma(cls, value: Any) -> Any:
        both = value if isinstance(value, list) else [value]
        right = all(isinstance(one, (int, float)) and not isinstance(one, bool) and one >= 0 for one in both)
        if not right or (len(both) != 2 if isinstance(value, list) else value > 1):
            raise ValueError(f"{value!r} is no gamma; a number from 0 to 1 is, or two scales of at least 0 in a list")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.merge:
            plain = type(self).model_construct()
            for name in type(self).model_fields:
                if name != "merge" and getattr(self, name) != getattr(plain, name):
                    raise ValueError(f"merge and {name} are given; a step that merges takes nothing else")
        if self.budget is not None and (self.rank is not None or self.within_rank):
            raise ValueError(f"budget and {'rank' if self.rank is not None else 'within_rank'} are given; give one")
        if self.elements and self.columns:
            raise ValueError("columns and elements are given; the sparse part is one of them")
        if self.elements and (self.activation != "identity" or self.adapter):
            what = "an adapter" if self.adapter else f"the activation {self.activation}"
            raise ValueError(f"elements are added to the matrix of the pair, which {what} leaves no room for")
        if self.init == "zero" and not self.adapter and not self.wanted.columns and not self.elements:
            raise ValueError("init: zero without a sparse part or an adapter gives nothing that a gradient could reach")
        if self.alpha != 1.0 and not self.adapter:
            raise ValueError("alpha belongs to an adapter; add adapter: true")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """The sizes of the paper's model of 60M parameters, width 512.

        Args:
            overrides: fields that the caller sets.
        """
        return cls(**{"rank": 128, "complement_rank": 256, **overrides})

    @classmethod
    def low_rank(cls, init: Init = "kaiming", **overrides: Any) -> Self:
        """A low-rank pair alone, y = B A x.

        Args:
            init: of the pair. Default `kaiming`.
            overrides: fields that the caller sets.
        """
        return cls(**{"columns": 0, "gamma": 1.0, "activation": "identity", "init": init, **overrides})

    @classmethod
    def cola(cls, **overrides: Any) -> Self:
        """CoLA, y = B silu(A x).

        Args:
            overrides: fields that the caller sets.
        """
        return cls(**{"columns": 0, "gamma": 1.0, "activation": "silu", "init": "cola", **overrides})

    @classmethod
    def sltrain(cls, **overrides: Any) -> Self:
        """SLTrain, y = (α / r BA + S) x with single weights S at random places.

        Args:
            overrides: fields that the caller sets. Its own: 3 % of the weights, and α / r = 32 / 128.
        """
        own = {"elements": 0.03, "gamma": [0.25, 1.0], "activation": "identity", "init": "zero"}
        return cls(**{**own, **overrides})

    @property
    def wanted(self) -> Wanted:
        """What decides the sizes."""
        columns = (0 if self.elements else COLUMNS) if self.columns is None else self.columns
        return Wanted(self.rank, columns, self.elements, self.budget, self.within_rank)

    def start(self, width: int, seed: int) -> Start:
        """What decides the values.

        Args:
            width: of the model.
            seed: of what is drawn.
        """
        low, sparse = self.gamma if isinstance(self.gamma, list) else (self.gamma, 1 - self.gamma)
        return Start(
            form=Form(low, sparse, self.activation),
            init=self.init,
            by=self.columns_by,
            inverse=self.inverse,
            values=self.column_values,
            triples=self.complement_rank or max(1, round(COMPLEMENT_SHARE * width)),
            alpha=self.alpha if self.adapter else None,
            seed=seed,
        )

    def taken(self, names: Sequence[str]) -> list[str]:
        """The projections that are replaced, in order.

        Args:
            names: of all.

        Raises:
            IntaglioError: there is none, or a pattern fits none.
        """
        if not names:
            raise IntaglioError("no projection of this model is a plain matrix, so lost has nothing to replace")
        ranks = list(self.rank) if isinstance(self.rank, dict) else []
        check_patterns(names, {"targets": self.targets or [], "ignore": self.ignore, "rank": ranks})
        left = [names[place] for place in select_layers(names, self.targets, self.ignore)]
        if not left:
            raise IntaglioError("targets and ignore leave no layer of this model to replace")
        return left

    def sizes(self, parts: Anatomy) -> dict[str, Sizes]:
        """The sizes of every projection that is replaced, by its full name.

        Args:
            parts: of the model.

        Raises:
            IntaglioError: see the class.
        """
        shapes = {name: linear.shape for name, linear in parts.all_linears()}
        width = int(parts.config.hidden_size)
        taken = self.taken(list(shapes))
        most = max(min(shapes[name]) for name in taken)
        for rank in self.rank.values() if isinstance(self.rank, dict) else [self.rank]:
            if isinstance(rank, int) and rank > most:
                raise IntaglioError(f"rank is {rank}, above {most}, the most that a projection of this model can have")
        return {name: self.wanted.of(name, *shapes[name], width) for name in taken}

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Refuse names that fit nothing.

        Args:
            linears: `(name, rows, columns)` of each projection.

        Raises:
            IntaglioError: says which.
        """
        if not self.merge:
            self.taken([name for name, _, _ in linears])

    def check_model(self, parts: Anatomy) -> None:
        """Refuse, before any work, sizes that do not fit, a gradient that cannot be had, and a merge that cannot be.

        Args:
            parts: of the model.

        Raises:
            IntaglioError: says which.
        """
        if self.merge:
            # A step before this one may still put them there; those that are there already can be looked at.
            for module in parts.model.modules():
                if isinstance(module, LostLinear) and module.form.activation != "identity":
                    module.dense()
            return
        plan_replacements(
            parts.model, self._linears(parts), parts.all_linears(), lambda name, linear: ReplacedLinear(1, 1)
        )
        self.sizes(parts)
        if self.columns_by == "gradient" and not predicts_next(parts):
            raise IntaglioError("columns_by is gradient, which needs a model that predicts the next token")

    def _linears(self, parts: Anatomy) -> list[tuple[str, Linear]]:
        every = dict(parts.all_linears())
        return [(name, every[name]) for name in self.taken(list(every))]

    def estimate(self, workload: Workload) -> Cost:
        """Return what the decompositions take, and a pass with its gradient where columns are chosen by it.

        Args:
            workload: of the model.
        """
        if self.merge:
            return Cost()
        flops = sum(SVD_FLOPS * min(shape) ** 2 * float(max(shape)) for shape in workload.linears)
        largest = max((rows * columns for rows, columns in workload.linears), default=0)
        extra = 16 * largest
        if self.needs_calibration:
            flops += 6.0 * workload.parameters * workload.tokens
            extra += workload.block_parameters * workload.element_size + 64 * workload.batch_tokens * workload.hidden
        return Cost(flops=flops, extra_bytes=extra)

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Replace the projections of `checkpoint`, or merge them, in place, and return it.

        Args:
            checkpoint: what is carved.
            calibration: for `columns_by: gradient`: segments, token ids [N, L], texts, a bundled name, a file or a
                folder. Otherwise not looked at.
            seed: of columns, single weights and factors that are drawn. Default 0.
            batch_size: sequences that pass at a time, for the gradient. Default 4.
            progress: called after each projection.

        Raises:
            IntaglioError: see the class.
        """
        parts = anatomy(checkpoint.model)
        self.check_model(parts)
        if self.merge:
            chosen = self._merge(checkpoint)
            checkpoint.record_step(self.slug, self.model_dump(), seed=seed, chosen=chosen)
            return checkpoint
        sizes, linears, start = self.sizes(parts), self._linears(parts), self.start(parts.config.hidden_size, seed)
        identity, scores = None, {}
        if self.needs_calibration:
            data = as_segments(checkpoint, calibration, SAMPLES, LENGTH, seed)
            identity, scores = describe(data, batch_size), column_gradients(checkpoint.model, linears, data, batch_size)

        def make(name: str, linear: Linear) -> ReplacedLinear:
            made.append(name)
            progress(len(made), len(linears), f"lost: {name}")
            return start.module(name, linear, sizes[name], scores.get(name))

        made: list[str] = []
        replace_modules(checkpoint.model, plan_replacements(checkpoint.model, linears, parts.all_linears(), make))
        chosen = summary(sizes)
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, calibration=identity, chosen=chosen)
        group = {
            "form": asdict(start.form),
            "alpha": start.alpha,
            "projections": {name: [one.rank, one.columns, one.elements] for name, one in sizes.items()},
        }
        before = [known for known in checkpoint.record.live if known.get("slug") == self.slug]
        checkpoint.set_runtime_state(self.slug, {"groups": [*(g for known in before for g in known["groups"]), group]})
        if self.adapter:
            freeze(checkpoint.model)
        return checkpoint

    def _merge(self, checkpoint: Checkpoint) -> dict[str, Any]:
        before = sum(p.numel() for p in checkpoint.model.parameters())
        if not merge(checkpoint.model):
            raise IntaglioError("merge is asked for, and this checkpoint has no projection of lost")
        checkpoint.set_runtime_state(self.slug, None)
        return {"parameters_before": before, "parameters": sum(p.numel() for p in checkpoint.model.parameters())}

    @classmethod
    def build_empty(cls, part: Mapping[str, Any], model: nn.Module) -> None:
        """Put empty modules of the right sizes into a model that has no weights yet.

        Args:
            part: from the record.
            model: on the meta device.
        """
        for group in part["groups"]:
            with torch.device("cpu"):  # rows of fused projections are looked at
                every = anatomy(model).all_linears()
            there, known = dict(every), group["projections"]
            linears = [(name, there[name]) for name in known]
            start = Start(Form(**group["form"]), alpha=group["alpha"])

            def make(
                name: str, linear: Linear, start: Start = start, known: Mapping[str, Sequence[int]] = known
            ) -> ReplacedLinear:
                outputs, inputs = linear.shape
                rank, columns, elements = known[name]
                sizes = Sizes(inputs, outputs, rank, columns, elements)
                made = start.empty(sizes, linear.module.bias is not None, isinstance(linear.module, Conv1D))
                return made.to(cast(Tensor, linear.module.weight).dtype)

            replace_modules(model, plan_replacements(model, linears, every, make))

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Freeze what an adapter leaves alone; the modules are there.

        Args:
            part: from the record.
            checkpoint: just loaded.
        """
        if any(group["alpha"] is not None for group in part["groups"]):
            freeze(checkpoint.model)


def lostify(module: nn.Module, *, seed: int = 0, **fields: Any) -> dict[str, Sizes]:
    """Replace the linear layers of any module in place, before it is trained.

    A share as `rank` is one of each layer's narrower side here, and so is the default of `complement_rank`. No layer is
    taken apart, and heads are replaced as all others are: name them in `ignore`.

    Args:
        module: has `nn.Linear` (or `Conv1D`) somewhere below it.
        seed: of what is drawn. Default 0.
        fields: of `LOST`; without `columns_by: gradient` and `merge`.

    Returns:
        What each layer was replaced by; `Sizes.parameters` and `.dense` count its numbers.

    Raises:
        IntaglioError: a field does not fit, a name fits no layer, or two layers share one weight.
    """
    method = LOST(**fields)
    if method.merge or method.columns_by == "gradient":
        what = "merge" if method.merge else "columns_by: gradient"
        raise IntaglioError(f"{what} has no meaning for a module alone; use LOST on a checkpoint, or merge")
    inside = {id(part) for m in module.modules() if isinstance(m, ReplacedLinear) for part in m.modules()}
    linears: dict[str, Linear] = {}
    owners: dict[int, str] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if name and isinstance(layer, (nn.Linear, Conv1D)) and id(layer) not in inside:
            linears[name] = Linear(name, "mlp", name.rpartition(".")[2], layer)
    made: dict[str, nn.Module] = {}
    sizes: dict[str, Sizes] = {}
    for name in method.taken(list(linears)):
        linear = linears[name]
        other = owners.setdefault(id(linear.module.weight), name)
        if other != name:
            raise IntaglioError(f"{other} and {name} share one weight, so they cannot be replaced")
        narrow = min(linear.shape)
        sizes[name] = method.wanted.of(name, *linear.shape, narrow)
        made[name] = method.start(narrow, seed).module(name, linear, sizes[name])
    replace_modules(module, made)
    if method.adapter:
        freeze(module)
    return sizes


__all__ = ["LOST", "ElementsLinear", "Form", "LostLinear", "Sizes", "lostify", "merge"]
