"""LOST (Li et al., LOST: Low-rank and Sparse Pre-training for Large Language Models, 2025).

- `layers`: the replacements of a projection.
- `init`: their initial values, from one singular value decomposition.
- `sizing`: ranks, columns, exact counts.
- `saliency`: scores of columns by the gradient of the loss.

The paper's body and the code that its abstract names could not be had: mechanism and defaults are those of scripts that
look like the authors' own, checked against what the paper's public reviews quote. Those scripts copy the left vectors
of the weight into the factor that meets the input, which fits square layers alone; here each factor gets the vectors of
its own side.

Dimension letters: I inputs, O outputs, R rank, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import count
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.calibration import as_segments
from intaglio.checkpoint.replacement import ReplacesLinears, non_default_fields
from intaglio.errors import IntaglioError
from intaglio.masks import predicts_next
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.methods.weights.lost.init import ColumnScore, Init, InitConfig
from intaglio.methods.weights.lost.layers import Activation, ElementsLinear, LostLinear, LostLinearConfig, LowRankLinear
from intaglio.methods.weights.lost.saliency import column_gradients
from intaglio.methods.weights.lost.sizing import COLUMN_SHARE, COMPLEMENT_SHARE, LayerSizes, SizeSpec
from intaglio.methods.weights.one_shot import LENGTH, SAMPLES, describe
from intaglio.modeling.anatomy import Anatomy, Linear, anatomy
from intaglio.modeling.replacement import merge_linears
from intaglio.modeling.targets import projections, replace_linears

__all__ = ["LOST", "ElementsLinear", "LayerSizes", "LostLinear", "LostLinearConfig", "merge"]

Number = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)]
Rank = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]
Scale = Annotated[float, Field(ge=0)]

SVD_FLOPS = 22
"""Operations of a thin decomposition over (the narrower side)² · (the wider side)."""


def _is_amount(value: Any, least: int) -> bool:
    """Return whether a value is a number of at least `least`, or a share up to 1 (above 0 where `least` is)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value >= least if isinstance(value, int) else 0 <= value <= 1 and (value > 0 or not least)


class LOST(ReplacesLinears, Method, slug="lost"):
    """Replaces each projection by a low-rank pair and a few whole columns, which are trained instead of it.

    From the current weight W0 [O, I], usually a random initialisation, with W0 = U diag(S) Vᵀ:

        B = U_r √S_r [O, r],  A = √S_r V_rᵀ [r, I]
        W_comp = the sum of the singular triples r .. r + k - 1
        J = the c columns of W_comp with the largest norms, Ws = W0[:, J] [O, c]
        y = γ act(x Aᵀ) Bᵀ + (1 - γ) x[J] Wsᵀ + bias

    W0 is discarded: weights, gradients and the optimizer's moments are those of r (I + O) + c O numbers a projection
    instead of I O. Embeddings, norms and the head stay dense. The set J stays as it is; a later `train` step trains A,
    B and Ws. γ and 1 - γ shrink both parts below what W0 gave, and nothing makes up for that. Weight decay on A and B
    is no decay on BA. Fused projections are taken apart, each with factors of its own.

    The checkpoint needs `intaglio.load`. Without an activation between the factors the parts are one matrix:
    `LOST(merge=True)`, or `lost: {merge: true}` after the training, restores stock layers with that matrix, and the
    checkpoint is a plain one again. In Python, `LOST().replace(module)` replaces the linear layers of any torch module,
    and `merge(module)` restores stock ones.

    Its baselines have the same interface: `LOST.low_rank()`, `LOST.cola()`, `LOST.sltrain()`, and `columns_by: random`.

    Source: Li et al., LOST: Low-rank and Sparse Pre-training for Large Language Models, 2025 (arXiv 2508.02668);
    sources are listed in `intaglio.methods.weights.lost`. CoLA: Liu et al., CoLA: Compute-Efficient Pre-Training of
    LLMs via Low-Rank Activation, 2025. SLTrain: Han et al., SLTrain: a sparse plus low-rank approach for parameter and
    memory efficient pretraining, NeurIPS 2024.

    Args:
        rank: r, a number or a share (a fraction such as 0.25) of the model's width; or either by shell patterns of the
            projections' names, the first match counts (`{"*.mlp.*": 48, "*": 0.25}`). Cut to a projection's
            narrower side. Default: a quarter of the width, as 128 of 512 in the paper's smallest model.
        columns: c, a number or a share δ of a projection's inputs (then at least 1); 0: none. Default 0.05; none where
            `elements` is given.
        elements: instead of columns, single weights at random positions (SLTrain), a number or a share of the
            projection's. Default 0.
        gamma: γ, scale of the low-rank part, while the sparse part has 1 - γ; or both scales, `[low, sparse]`. Default
            0.7.
        complement_rank: k, triples of the complement, cut to what is left. Default: half of the width, as 256 of 512.
        activation: between the factors, `silu` (default) or `identity`.
        columns_by: norms of the complement's columns, `l2` (default) or `l1`; `random`; or `gradient`, the norm of the
            columns of the loss's gradient over the calibration texts.
        inverse: whether the complement is made of the k smallest triples. Default False.
        column_values: source of Ws, the `weight` (default) or the `complement`.
        init: of the pair, `svd` (default); `cola`, normal with standard deviation r^(-1/4) (I + O)^(-1/4); `kaiming`,
            both factors as `nn.Linear` is drawn; or `zero`, A so and B zero.
        targets: projections to replace, by name or shell pattern. Default: all of the blocks'.
        ignore: projections left alone, in the same way. Default: none.
        budget: instead of a rank, the share of a projection's numbers that its parts may have together; the largest
            rank that fits is taken.
        within_rank: whether the rank is reduced by the size of the sparse part, so that no projection has more numbers
            than the pair of `rank` alone. Default False.
        adapter: whether W0 stays, frozen, and the parts are added to it: y = W0 x + bias + (α / r) (the parts). All
            else is frozen too. It is no LoRA: W0's own directions begin in the parts, so the function changes at once.
            Default False.
        alpha: α of an adapter. Default 1.
        merge: whether this step restores stock layers, instead of all the above. Default False.

    Raises:
        IntaglioError: a name matches no projection, part of a fused module is named without the rest, nothing is left
            for a rank, a rank is above that of every projection, a gradient is needed from a model that predicts no
            next token, or nothing can be merged.
    """

    kinds = ("carving",)
    summary = (
        "replaces each projection by a low-rank pair and a few whole columns, to train from scratch in less memory"
    )
    citation = "Li et al., LOST: Low-rank and Sparse Pre-training for Large Language Models, 2025"
    url = "https://arxiv.org/abs/2508.02668"
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    module_types: ClassVar[tuple[type[LowRankLinear], ...]] = (LostLinear, ElementsLinear)

    rank: Rank | dict[str, Rank] | None = None
    columns: Number | None = None
    elements: Number = 0
    gamma: Annotated[float, Field(ge=0, le=1)] | Annotated[list[Scale], Field(min_length=2, max_length=2)] = 0.7
    complement_rank: Annotated[int, Field(ge=1)] | None = None
    activation: Activation = "silu"
    columns_by: ColumnScore = "l2"
    inverse: bool = False
    column_values: Literal["weight", "complement"] = "weight"
    init: Init = "svd"
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    within_rank: bool = False
    adapter: bool = False
    alpha: Annotated[float, Field(gt=0)] = 1.0
    merge: bool = False

    # One sentence each: of a field that takes several types, pydantic reports what is wrong with each type.
    @field_validator("rank", mode="before")
    @classmethod
    def _rank(cls, value: Any) -> Any:
        for rank in value.values() if isinstance(value, dict) else [] if value is None else [value]:
            if not _is_amount(rank, least=1):
                raise ValueError(f"{rank!r} is no rank; a number of at least 1 or a share above 0.0 and up to 1.0 is")
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
        scales = value if isinstance(value, list) else [value]
        valid = all(isinstance(one, (int, float)) and not isinstance(one, bool) and one >= 0 for one in scales)
        if not valid or (len(scales) != 2 if isinstance(value, list) else value > 1):
            raise ValueError(f"{value!r} is no gamma; a number from 0 to 1 is, or two scales of at least 0 in a list")
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        for name in non_default_fields(self) if self.merge else []:
            if name != "merge":
                raise ValueError(f"merge and {name} are given; a step that merges takes nothing else")
        if self.budget is not None and (self.rank is not None or self.within_rank):
            raise ValueError(f"budget and {'rank' if self.rank is not None else 'within_rank'} are given; give one")
        if self.elements and self.columns:
            raise ValueError("columns and elements are given; the sparse part is one of them")
        if self.elements and (self.activation != "identity" or self.adapter):
            what = "an adapter" if self.adapter else f"the activation {self.activation}"
            raise ValueError(f"elements are added to the matrix of the pair, which {what} leaves no room for")
        if self.init == "zero" and not self.adapter and not self.size_spec.columns and not self.elements:
            raise ValueError("init: zero without a sparse part or an adapter gives nothing that a gradient could reach")
        if self.alpha != 1.0 and not self.adapter:
            raise ValueError("alpha belongs to an adapter; add adapter: true")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the method with the sizes of the paper's model of 60M parameters, width 512."""
        return cls(**{"rank": 128, "complement_rank": 256, **overrides})

    @classmethod
    def low_rank(cls, init: Init = "kaiming", **overrides: Any) -> Self:
        """Return a low-rank pair alone, y = B A x, both factors drawn as `nn.Linear` is by default."""
        return cls(**{"columns": 0, "gamma": 1.0, "activation": "identity", "init": init, **overrides})

    @classmethod
    def cola(cls, **overrides: Any) -> Self:
        """Return CoLA, y = B silu(A x)."""
        return cls(**{"columns": 0, "gamma": 1.0, "activation": "silu", "init": "cola", **overrides})

    @classmethod
    def sltrain(cls, **overrides: Any) -> Self:
        """Return SLTrain, y = (α / r BA + S) x with 3 % single weights S at random positions, and α / r = 32 / 128."""
        own = {"elements": 0.03, "gamma": [0.25, 1.0], "activation": "identity", "init": "zero"}
        return cls(**{**own, **overrides})

    # A step that merges needs matrices, and restores what the step that replaced them invalidated.
    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        """Whether columns are chosen by the gradient."""
        return self.columns_by == "gradient" and not self.merge

    @property
    def requires(self) -> frozenset[Capability]:  # type: ignore[override]
        """Plain weights, or matrices to merge."""
        return frozenset({"matrix_products" if self.merge else "linear_weights"})

    @property
    def invalidates(self) -> frozenset[Capability]:  # type: ignore[override]
        """Plain weights, and matrix products where an activation is between the factors."""
        if self.merge:
            return frozenset()
        return frozenset({"linear_weights"} if self.activation == "identity" else {"linear_weights", "matrix_products"})

    @property
    def restores(self) -> frozenset[Capability]:  # type: ignore[override]
        """Plain weights, after a merge."""
        return frozenset({"linear_weights"} if self.merge else ())

    @property
    def patterns(self) -> dict[str, Sequence[str]]:
        """The names and patterns of all fields that select projections, `rank` included."""
        return {**super().patterns, "rank": list(self.rank) if isinstance(self.rank, dict) else []}

    @property
    def size_spec(self) -> SizeSpec:
        """The fields that decide sizes."""
        columns = (0 if self.elements else COLUMN_SHARE) if self.columns is None else self.columns
        return SizeSpec(self.rank, columns, self.elements, self.budget, self.within_rank)

    def init_config(self, width: int, seed: int) -> InitConfig:
        """Return the fields that decide initial values, for a model's width and a seed of the random draws."""
        low, sparse = self.gamma if isinstance(self.gamma, list) else (self.gamma, 1 - self.gamma)
        return InitConfig(
            LostLinearConfig(low, sparse, self.activation),
            init=self.init,
            columns_by=self.columns_by,
            inverse=self.inverse,
            column_values=self.column_values,
            triples=self.complement_rank or max(1, round(COMPLEMENT_SHARE * width)),
            alpha=self.alpha if self.adapter else None,
            seed=seed,
        )

    def layer_sizes(self, model: nn.Module) -> dict[str, LayerSizes]:
        """Return the sizes of every projection to replace, by its full name.

        Raises:
            IntaglioError: see the class.
        """
        names, shapes = self.plan(model), {name: linear.shape for name, linear in projections(model)}
        most = max(min(shapes[name]) for name in names)
        for rank in self.rank.values() if isinstance(self.rank, dict) else [self.rank]:
            if isinstance(rank, int) and rank > most:
                raise IntaglioError(f"rank is {rank}, above {most}, the most that a projection of this model can have")
        return {name: self.size_spec.layer_sizes(name, *shapes[name], _width(model, shapes[name])) for name in names}

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Refuse names that match none of the projections `(name, rows, columns)`."""
        if not self.merge:
            super().check(linears)

    def check_model(self, parts: Anatomy) -> None:
        """Refuse, before any work, sizes that do not fit, an unavailable gradient, and a merge of no matrices."""
        if self.merge:
            # An earlier step may still put them there; those that are there already can be checked.
            for module in self.modules_of(parts.model).values():
                if module.config.activation != "identity":
                    module.dense()
            return
        self.layer_sizes(parts.model)
        if self.columns_by == "gradient" and not predicts_next(parts):
            raise IntaglioError("columns_by is gradient, which needs a model that predicts the next token")

    def estimate(self, workload: Workload) -> Cost:
        """Return the cost of the decompositions, and of a pass with its gradient where columns are chosen by it."""
        if self.merge:
            return Cost()
        flops = sum(SVD_FLOPS * min(shape) ** 2 * float(max(shape)) for shape in workload.linears)
        extra = 16 * max((rows * columns for rows, columns in workload.linears), default=0)
        if self.needs_calibration:
            flops += 6.0 * workload.parameters * workload.tokens
            extra += workload.block_parameters * workload.element_size + 64 * workload.batch_tokens * workload.hidden
        return Cost(flops=flops, extra_bytes=extra)

    def replace(
        self,
        model: nn.Module,
        *,
        seed: int = 0,
        scores: Mapping[str, Tensor] | None = None,
        progress: Progress = no_progress,
    ) -> dict[str, LayerSizes]:
        """Replace the projections of a transformer's blocks, or the linear layers of any other module, in place.

        In a module that is no transformer, a share as `rank` is one of each layer's narrower side, and so is the
        default of `complement_rank`.

        Args:
            model: what is changed.
            seed: of the random draws. Default 0.
            scores: of the columns [I] by projection, for `columns_by: gradient`. Default: none.
            progress: called before each projection.

        Returns:
            The sizes by projection; `LayerSizes.parameters` and `.dense` count their numbers.

        Raises:
            IntaglioError: see the class.
        """
        if self.merge:
            raise IntaglioError(
                "merge is true, which replaces nothing; use intaglio.methods.weights.lost.merge on a module"
            )
        sizes, done = self.layer_sizes(model), count(1)

        def make(name: str, linear: Linear) -> LowRankLinear:
            progress(next(done), len(sizes), f"lost: {name}")
            config = self.init_config(_width(model, linear.shape), seed)
            return config.build(name, linear, sizes[name], (scores or {}).get(name))

        replace_linears(model, sizes, make)
        if self.adapter:
            _freeze_rest(model)
        return sizes

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
            checkpoint: the checkpoint.
            calibration: for `columns_by: gradient`: segments, token ids [N, L], texts, a bundled name, a file or a
                folder. Otherwise ignored.
            seed: of random columns, single weights and factors. Default 0.
            batch_size: sequences of a pass, for the gradient. Default 4.
            progress: called for each projection.

        Raises:
            IntaglioError: see the class.
        """
        model = checkpoint.model
        parts = anatomy(model)
        self.check_model(parts)
        if self.merge:
            before = sum(p.numel() for p in model.parameters())
            if not merge(model):
                raise IntaglioError("merge is true, and this checkpoint has no projection of lost")
            checkpoint.set_runtime_state(self.slug, None)
            sizes = {"parameters_before": before, "parameters": sum(p.numel() for p in model.parameters())}
            checkpoint.record_step(self.slug, self.model_dump(), seed=seed, chosen=sizes)
            return checkpoint
        identity, scores = None, {}
        if self.needs_calibration:
            data, names = as_segments(checkpoint, calibration, SAMPLES, LENGTH, seed), self.plan(model)
            linears = [(name, linear) for name, linear in parts.all_linears() if name in names]
            identity, scores = describe(data, batch_size), column_gradients(model, linears, data, batch_size)
        layers = self.replace(model, seed=seed, scores=scores, progress=progress)
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, calibration=identity, chosen=_summary(layers))
        config = self.init_config(parts.config.hidden_size, seed)
        group = {
            "form": asdict(config.config),
            "alpha": config.alpha,
            "projections": {name: [size.rank, size.columns, size.elements] for name, size in layers.items()},
        }
        earlier = [
            group for part in checkpoint.record.live if part.get("slug") == self.slug for group in part["groups"]
        ]
        checkpoint.set_runtime_state(self.slug, {"groups": [*earlier, group]})
        return checkpoint

    @classmethod
    def build_empty(cls, part: Mapping[str, Any], model: nn.Module) -> None:
        """Put empty modules of the recorded sizes into a model without weights."""
        for group in part["groups"]:
            config = InitConfig(LostLinearConfig(**group["form"]), alpha=group["alpha"])

            def empty(
                name: str, linear: Linear, config: InitConfig = config, known: Mapping[str, Any] = group["projections"]
            ) -> LowRankLinear:
                outputs, inputs = linear.shape
                stock, sizes = linear.module, LayerSizes(inputs, outputs, *known[name])
                module = config.empty(sizes, stock.bias is not None, isinstance(stock, Conv1D))
                return module.to(cast(Tensor, stock.weight).dtype)

            replace_linears(model, group["projections"], empty)

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Check that the modules are in a loaded model, and freeze what an adapter leaves alone."""
        cls.check_restored(checkpoint.model, sum(len(group["projections"]) for group in part["groups"]))
        if any(group["alpha"] is not None for group in part["groups"]):
            _freeze_rest(checkpoint.model)


def merge(module: nn.Module) -> list[str]:
    """Replace the layers that `LOST` put into a module by stock layers with the same matrices.

    Everything that an adapter had frozen can be trained again.

    Args:
        module: changed in place, or not at all.

    Returns:
        The names of the layers; none if it has none.

    Raises:
        IntaglioError: there is an activation between the factors.
    """
    adapters = any(isinstance(part, LostLinear) and part.weight is not None for part in module.modules())
    names = merge_linears(module, LOST.module_types)
    if adapters:
        module.requires_grad_(True)
    return names


def _width(model: nn.Module, shape: tuple[int, int]) -> int:
    """Return the width that ranks may be shares of."""
    return int(model.config.get_text_config().hidden_size) if isinstance(model, PreTrainedModel) else min(shape)


def _freeze_rest(model: nn.Module) -> None:
    """Leave only factors and columns of adapters to be trained."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LostLinear):
            module.down.weight.requires_grad_(True)
            module.up.weight.requires_grad_(True)


def _summary(sizes: Mapping[str, LayerSizes]) -> dict[str, Any]:
    """Return `[rank, columns or elements]` for the record, by kind of projection, or by name where they differ."""
    by_kind: dict[str, dict[str, list[int]]] = {}
    for name, size in sizes.items():
        kind = name.split(".", 2)[2] if name.startswith("layers.") else name
        by_kind.setdefault(kind, {})[name] = [size.rank, size.columns or size.elements]
    ranks: dict[str, list[int]] = {}
    for kind, layers in by_kind.items():
        first = next(iter(layers.values()))
        ranks |= {kind: first} if all(pair == first for pair in layers.values()) else layers
    parameters, dense = sum(s.parameters for s in sizes.values()), sum(s.dense for s in sizes.values())
    return {"parameters": parameters, "dense_parameters": dense, "rank_and_sparse": ranks}
