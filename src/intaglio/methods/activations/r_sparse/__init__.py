"""RSparse (Zhang et al., R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference, ICLR 2025).

    y = W (m x) + U_r S_r V_r^T ((1 - m) x),   m_i = not (|x_i| ||W[:, i]|| <= threshold)

- `carve`: from calibration data to layers.
- `sizes`: channels and ranks within a budget.
- `thresholds`, `decompose`, `tables`: what each projection would do, from calibration text and its weight.
- `linear`: the layer, and which tokens of a pass are dense.
- `surgery`: layers in a checkpoint, and their way through a reload.
- `search`: the evolutionary search for the split of the budgets.
- `greedy`: TEAL's allocation over the projections of a block.
- `cats`: CATS, a baseline.
- `reading`: weights and bytes that a token reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.calibration import as_segments
from intaglio.errors import IntaglioError
from intaglio.masks import predicts_next
from intaglio.methods.activations.r_sparse import carve, cats, decompose, greedy, surgery
from intaglio.methods.activations.r_sparse.linear import Mode, SparseLinear
from intaglio.methods.activations.r_sparse.reading import Reading, reading
from intaglio.methods.activations.r_sparse.search import Search
from intaglio.methods.activations.r_sparse.sizes import Split, Wanted, alpha_of
from intaglio.methods.activations.r_sparse.tables import Options
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.modeling.anatomy import Anatomy, Linear, anatomy
from intaglio.modeling.replacement import ReplacedLinear
from intaglio.modeling.targets import check_patterns, plan_replacements, select_layers

SAMPLES = 16
LENGTH = 256
"""Calibration segments and their tokens, where text is given."""
ALPHA = 1.0
"""The default split: columns alone."""

__all__ = ["RSparse", "Reading", "Search", "SparseLinear", "Split", "reading"]

Share = Annotated[float, Field(ge=0, le=1)]


class RSparse(Method, slug="r_sparse"):
    """Multiplies each token with the columns of a projection that matter to it, and gives the rest a low rank.

    Of a projection W [O, I] = U S Vᵀ, with s_i = ||W[:, i]||₂ and a threshold τ from calibration text:

        m_i = not (|x_i| s_i <= τ)
        y = W (m x) + U_r S_r V_rᵀ ((1 - m) x) + bias

    A token may read a share 1 - s of the weights. Of that budget α goes to columns, the rest to the rank:

        c = max(int(I (1 - s) α), 1)                     columns, the share of all scores that is above τ
        r = max(int((I O (1 - s) - c O) / (I + O)), 1)   so c O + r (I + O) <= (1 - s) I O

    At α = 1 there is no low rank, at α = 0 there are no columns. τ is the int(n (1 - (1 - s) α))-th smallest of the n
    scores of all calibration tokens and inputs of the projection, in the dense model, so the number of columns varies
    with the token. Nothing is trained. The factors are added to the weights, so memory goes up; and a copy of each
    weight, column by column, is made when the first token is decoded (`intaglio.kernels.gather`), which is what makes
    it faster. Embeddings and the head stay dense.

    The checkpoint becomes a live one, which `intaglio.load` reads. Weights under thresholds are not trained further.
    What it is held against has the same interface: `RSparse.teal()`, thresholds on |x| alone, and `RSparse.cats()`,
    thresholds on the gates of the feed-forwards.

    Args:
        sparsity: s, the share of the projections' weights that a token does not read, 0 <= s < 1. Default 0.5.
        alpha: α, one number, or by name or shell pattern (`{"layers.0.*.q_proj": 0.2}`; the first that fits counts,
            what none fits has the default). Default 1: columns alone, which the authors' searched splits are near to
            but for the first queries and keys; a low rank is worth its bytes where a weight is nearly of low rank.
        search: looks for an α for each projection by evolution, the loss on calibration segments being the fitness:
            `{population, generations, segments, mutation, step}`. Default: no search.
        how: `r_sparse` (default), `teal` or `cats`.
        allocation: of TEAL, `uniform` (default) or `greedy`: each projection of a block has a share of its own, raised
            step by step where the block's output changes least.
        scale: whether the score is |x_i| s_i (default), or |x_i| alone; none: scaled unless α is 1, as in the authors'
            code. Each has a τ of its own.
        low_rank: whether the rest goes through the low rank. False gives columns the whole budget. Default True.
        rank: of every projection, in the place of what α leaves for it; the budget may then be overspent. Default:
            none.
        strict: whether nothing is overspent: the one column and the rank of one that the paper gives every projection
            at the least, too much for small ones, are left out where the budget has no room. Default False.
        threshold: `static` (default): one τ a projection; `topk`: the c largest scores of each token.
        mode: which tokens are sparse: `all` (default); `decode`, all but the prompt; or `last_fraction`, all but the
            front of the prompt. A pass without a cache counts as a prompt, so under these two a report measures the
            dense model on its texts, wholly or in part.
        fraction: the share of a prompt that is sparse under `last_fraction`. Default 0.1, as in the authors' code.
        tokens: of the calibration data that scores are taken of, evenly spaced. Default 4096.
        targets: projections by name or shell pattern. Default: all of the blocks'.
        ignore: projections that stay dense, in the same way. Default: none.

    Raises:
        IntaglioError: a name or pattern that fits no projection, part of a fused module without the rest, a rank above
            the width, inputs that are not finite, a search in a model that predicts no next token, a model without
            gates for `cats`, or prompts kept dense in a model that generates nothing.

    Source: Zhang, Liu, Tian, Khaitan, Wang and Li, R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM
    Inference, ICLR 2025, arXiv 2504.19449; code VITA-Group/R-Sparse, which takes attention for square: the ranks here
    are of the real shapes. TEAL: Liu et al., Training-Free Activation Sparsity in Large Language Models, ICLR 2025.
    """

    storage: ClassVar[Literal["runtime"]] = "runtime"
    needs_calibration: ClassVar[bool] = True
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights", "activations"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"linear_weights"})
    invalidates: ClassVar[frozenset[Capability]] = frozenset({"linear_weights", "matrix_products"})

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    alpha: Share | dict[str, Share] = ALPHA
    search: Search | None = None
    how: Literal["r_sparse", "teal", "cats"] = "r_sparse"
    allocation: Literal["uniform", "greedy"] = "uniform"
    scale: bool | None = True
    low_rank: bool = True
    rank: Annotated[int, Field(ge=1)] | None = None
    strict: bool = False
    threshold: Literal["static", "topk"] = "static"
    mode: Mode = "all"
    fraction: Share = 0.1
    tokens: Annotated[int, Field(ge=1)] = 4096
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    ignore: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        plain = type(self).model_fields
        of = {
            "teal": ("alpha", "search", "scale", "low_rank", "rank", "strict"),
            "cats": ("alpha", "search", "scale", "low_rank", "rank", "strict", "threshold"),
            "r_sparse": (),
        }[self.how]
        for name in of:
            if getattr(self, name) != plain[name].get_default():
                raise ValueError(f"how is {self.how!r}, which has no {name}")
        if self.allocation == "greedy" and (self.how != "teal" or self.threshold != "static"):
            raise ValueError("allocation: greedy belongs to how: teal with threshold: static")
        if self.fraction != plain["fraction"].default and self.mode != "last_fraction":
            raise ValueError("fraction belongs to mode: last_fraction")
        for name in ("alpha", "search", "rank"):
            if not self.low_rank and getattr(self, name) != plain[name].get_default():
                raise ValueError(f"low_rank is false, so there is no {name}")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Searched splits, thresholds from 512 tokens, and of a prompt the last tenth sparse, as the code has them.

        Args:
            overrides: fields that the caller sets.
        """
        return cls(
            **{"search": Search(population=32), "tokens": 512, "mode": "last_fraction", "scale": None, **overrides}
        )

    @classmethod
    def teal(cls, **overrides: Any) -> Self:
        """TEAL: every input whose |x| is above a threshold, and nothing of the others.

        Args:
            overrides: fields that the caller sets.
        """
        return cls(**{"how": "teal", **overrides})

    @classmethod
    def cats(cls, **overrides: Any) -> Self:
        """CATS: units of a gated feed-forward whose gate is above a threshold.

        Args:
            overrides: fields that the caller sets.
        """
        return cls(**{"how": "cats", **overrides})

    @property
    def long(self) -> bool:
        """Whether it may take so long that it goes on after a kill."""
        return self.search is not None

    @property
    def wanted(self) -> Wanted:
        """What decides sizes."""
        return Wanted(self.low_rank, self.rank, self.strict)

    def taken(self, names: Sequence[str]) -> list[str]:
        """The projections that take part, in order.

        Args:
            names: of all.

        Raises:
            IntaglioError: there is none, or a pattern fits none.
        """
        if not names:
            raise IntaglioError("no projection of this model is a plain matrix, so r_sparse has nothing to replace")
        alphas = list(self.alpha) if isinstance(self.alpha, dict) else []
        check_patterns(names, {"targets": self.targets or [], "ignore": self.ignore, "alpha": alphas})
        left = [names[place] for place in select_layers(names, self.targets, self.ignore)]
        if not left:
            raise IntaglioError("targets and ignore leave no layer of this model, so nothing would be sparse")
        return left

    def alphas(self, name: str) -> float:
        """The alpha of a projection before any search.

        Args:
            name: of it.
        """
        return 1.0 if self.how == "teal" else alpha_of(name, self.alpha, ALPHA)

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Refuse names that fit nothing, and ranks above the width.

        Args:
            linears: `(name, rows, columns)` of each projection.

        Raises:
            IntaglioError: says which.
        """
        names = set(self.taken([name for name, _, _ in linears]))
        for name, outputs, inputs in linears:
            if name in names and self.how == "r_sparse":
                self.wanted.of(name, outputs, inputs, self.sparsity, self.alphas(name))

    def check_model(self, parts: Anatomy) -> None:
        """Refuse, before any work, a model that lacks what the fields ask for.

        Args:
            parts: of the model.

        Raises:
            IntaglioError: says what.
        """
        shapes = {name: linear.shape for name, linear in parts.all_linears()}
        self.check([(name, *shape) for name, shape in shapes.items()])
        plan_replacements(
            parts.model, self._linears(parts), parts.all_linears(), lambda name, linear: ReplacedLinear(1, 1)
        )
        able = predicts_next(parts)
        if self.search is not None and not able:
            raise IntaglioError("search takes the loss of the next token, which this model does not predict")
        if self.mode != "all" and not able:
            raise IntaglioError(f"mode is {self.mode}, and this model generates nothing that comes behind a prompt")
        if self.how == "cats":
            names = self.taken(list(shapes))
            found = cats.gated(parts, names)
            cats.units_off(self.sparsity, {name: shapes[name] for name in names}, found.values())

    def _linears(self, parts: Anatomy) -> list[tuple[str, Linear]]:
        every = dict(parts.all_linears())
        return [(name, every[name]) for name in self.taken(list(every))]

    def estimate(self, workload: Workload) -> Cost:
        """Return what the walk, the selections, the decompositions and a search take.

        Args:
            workload: of the model.
        """
        tokens = min(self.tokens, workload.tokens)
        flops = 2.0 * workload.block_parameters * workload.tokens
        extra = tokens * max(columns for _, columns in workload.linears) * 8
        if self.low_rank and (self.alpha != 1 or self.search is not None or self.rank is not None):
            flops += sum(decompose.FLOPS * min(shape) ** 2 * float(max(shape)) for shape in workload.linears)
            extra += int(workload.block_parameters * (1 - self.sparsity) * workload.element_size)
        if self.search is not None:
            some = min(workload.tokens, self.search.segments * LENGTH)
            flops += 3.0 * self.search.evaluations * workload.parameters * some
        if self.allocation == "greedy":
            flops += greedy.PASSES * 2.0 * workload.block_parameters * min(workload.tokens, greedy.SEGMENTS * LENGTH)
        return Cost(flops, float(tokens * sum(columns for _, columns in workload.linears)), extra)

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
        directory: Path | None = None,
        resume: bool = False,
    ) -> Checkpoint:
        """Put sparse layers into `checkpoint` and return it.

        Args:
            checkpoint: changed in place.
            calibration: segments, token ids [N, L], texts, a bundled name, a file or a folder.
            seed: chooses the calibration documents, where text is given, and is that of the search. Default 0.
            batch_size: sequences that pass at a time. Default 4.
            progress: called after each batch and each evaluation of a search.
            directory: where a search keeps what it knows. Default: nowhere.
            resume: whether it goes on with what is there. Default False.

        Raises:
            IntaglioError: see the class.
        """
        parts = anatomy(checkpoint.model)
        self.check_model(parts)
        data = as_segments(checkpoint, calibration, SAMPLES, LENGTH, seed)
        names = self.taken([name for name, _ in parts.all_linears()])
        walking: dict[str, Any] = {"tokens": self.tokens, "batch_size": batch_size, "progress": progress}
        cuts: dict[str, float] = {}
        if self.how == "cats":
            layers, cuts, chosen = carve.cut(checkpoint, data, names, self.sparsity, **walking)
        elif self.allocation == "greedy":
            layers, chosen = carve.allocated(checkpoint, data, names, self.sparsity, **walking)
        else:
            scale = False if self.how == "teal" else self.scale
            options = Options(self.wanted, self.sparsity, scale, self.threshold == "topk")
            start = {name: self.alphas(name) for name in names}
            going_on: dict[str, Any] = {"seed": seed, "directory": directory, "resume": resume}
            layers, chosen = carve.split(checkpoint, data, start, options, self.search, **going_on, **walking)
        surgery.freeze(checkpoint.model)
        surgery.set_phase(checkpoint.model, self.mode, self.fraction)
        identity = {"digest": data.digest, "samples": data.n, "length": data.length, "batch_size": batch_size}
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, calibration=identity, chosen=chosen)
        checkpoint.set_runtime_state(
            self.slug, surgery.part_of(checkpoint.model, layers, cuts, self.mode, self.fraction)
        )
        return checkpoint

    @classmethod
    def build_empty(cls, part: Mapping[str, Any], model: nn.Module) -> None:
        """Put empty layers into a model that has no weights yet.

        Args:
            part: of the record.
            model: on the meta device.
        """
        surgery.build_empty(part, model)

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Say which tokens are dense, and refuse thresholds of another model.

        Args:
            part: of the record.
            checkpoint: just loaded.

        Raises:
            IntaglioError: the thresholds were calibrated on other weights.
        """
        surgery.restore_runtime(part, checkpoint)
