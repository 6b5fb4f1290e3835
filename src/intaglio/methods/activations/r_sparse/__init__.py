"""R-Sparse (Zhang et al., R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference, ICLR 2025).

    y = W (m x) + U_r S_r V_r^T ((1 - m) x),   m_i = not (|x_i| ||W[:, i]|| <= threshold)

- `calibrate`: from calibration data to layers.
- `budget`: channels and ranks within a budget.
- `thresholds`, `decomposition`, `layer_options`: the options of each projection, from calibration text and its weight.
- `layers`: the layer, and which tokens of a pass are dense.
- `search`: the evolutionary search for the split of the budgets.
- `teal`, `cats`: allocation and layers of the baselines.
- `bytes_read`: weights and bytes that a token reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.calibration import as_segments
from intaglio.checkpoint.replacement import ReplacesLinears, non_default_fields
from intaglio.errors import IntaglioError
from intaglio.masks import predicts_next
from intaglio.methods.activations.r_sparse import calibrate, cats, teal
from intaglio.methods.activations.r_sparse.budget import BudgetSpec, BudgetSplit, alpha_of
from intaglio.methods.activations.r_sparse.bytes_read import BytesRead, measure_bytes_read
from intaglio.methods.activations.r_sparse.decomposition import FLOPS
from intaglio.methods.activations.r_sparse.layer_options import OptionSpec
from intaglio.methods.activations.r_sparse.layers import (
    DensePrefill,
    InputRule,
    Mode,
    SparseLinear,
    ThresholdedActivation,
    share_inputs,
)
from intaglio.methods.activations.r_sparse.search import Search
from intaglio.methods.base import Capability, Cost, Method, Progress, Workload, no_progress
from intaglio.modeling.anatomy import Anatomy, Linear, anatomy
from intaglio.modeling.targets import replace_linears
from intaglio.speculative.prepacked_linear import use_in_passes

SAMPLES = 16
LENGTH = 256
"""Calibration segments and their tokens, where text is given."""
ALPHA = 1.0
"""The default split: columns alone."""

__all__ = ["BudgetSplit", "BytesRead", "RSparse", "Search", "SparseLinear", "measure_bytes_read"]

Share = Annotated[float, Field(ge=0, le=1)]


class RSparse(ReplacesLinears, Method, slug="r_sparse"):
    """Multiplies each token with the columns of a projection that matter to it, and approximates the rest at low rank.

    Of a projection W [O, I] = U S Vᵀ, with s_i = ||W[:, i]||₂ and a threshold τ from calibration text:

        m_i = not (|x_i| s_i <= τ)
        y = W (m x) + U_r S_r V_rᵀ ((1 - m) x) + bias

    A token may read a share 1 - s of the weights. A share α of that budget goes to columns, the rest to the rank:

        c = max(int(I (1 - s) α), 1)                     columns, the share of all scores that is above τ
        r = max(int((I O (1 - s) - c O) / (I + O)), 1)   so c O + r (I + O) <= (1 - s) I O

    At α = 1 there is no low rank, at α = 0 there are no columns. τ is the int(n (1 - (1 - s) α))-th smallest of the n
    scores of all calibration tokens and inputs of the projection, in the dense model, so the number of columns varies
    with the token. Nothing is trained. The factors are added to the weights, so memory goes up; and a copy of each
    weight, column by column, is made when the first token is decoded (`intaglio.kernels.gather`), which is what makes
    it faster. Embeddings and the head stay dense; the head's product is the one measured to be fastest for few tokens.

    The checkpoint needs `intaglio.load`. Weights under thresholds are not trained further. Its baselines have the same
    interface: `RSparse.teal()`, thresholds on |x| alone, and `RSparse.cats()`, thresholds on the gates of the
    feed-forwards.

    Args:
        sparsity: s, the share of the projections' weights that a token does not read, 0 <= s < 1. Default 0.5.
        alpha: α, one number, or by name or shell pattern (`{"layers.0.*.q_proj": 0.2}`; the first match counts, others
            have the default). `error`: for each projection the α of 0.2, 0.5, 0.7, 0.8, 0.9, 0.95 and 1 with the least
            mean relative output error on the calibration tokens. Default 1: columns alone, near the authors' searched
            splits except for the first queries and keys; a low-rank part pays where a weight is nearly of low rank.
        search: evolutionary search for an α for each projection, with the loss on calibration segments as the fitness:
            `{population, generations, segments, mutation, step}`. Default: no search.
        how: `r_sparse` (default), `teal` or `cats`.
        allocation: of TEAL, `uniform` (default) or `greedy`: each projection of a block has a share of its own, raised
            step by step where the block's output changes least.
        scale: whether the score is |x_i| s_i (default), or |x_i| alone; none: scaled unless α is 1, as in the authors'
            code. Each has a τ of its own.
        low_rank: whether the rest goes through the low rank. False leaves it out and keeps the columns that α gives, to
            see what the low rank adds. Default True.
        rank: of every projection, instead of what α leaves for it; the budget may then be overspent. Default: none.
        strict: whether nothing is overspent: the paper's minimum of one column and a rank of one for every projection,
            too much for small ones, is left out where the budget has no room. Default False.
        threshold: `static` (default): one τ a projection; `topk`: the c largest scores of each token.
        mode: which tokens are sparse: `all` (default); `decode`, all but the prompt; or `last_fraction`, all but the
            front of the prompt. A pass without a cache counts as a prompt, so under these two a report measures the
            dense model on its texts, wholly or in part.
        fraction: the share of a prompt that is sparse under `last_fraction`. Default 0.1, as in the authors' code.
        tokens: of the calibration data, evenly spaced, from which thresholds are computed. Default 4096.
        targets: projections by name or shell pattern. Default: all of the blocks'.
        ignore: projections that stay dense, in the same way. Default: none.

    Raises:
        IntaglioError: a name or pattern that matches no projection, part of a fused module without the rest, a rank
            above the width, inputs that are not finite, a search in a model that predicts no next token, a model
            without gates for `cats`, or prompts kept dense in a model that generates nothing.

    Source: Zhang, Liu, Tian, Khaitan, Wang and Li, R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM
    Inference, ICLR 2025, arXiv 2504.19449; code VITA-Group/R-Sparse, which takes attention for square: the ranks here
    are of the real shapes. TEAL: Liu et al., Training-Free Activation Sparsity in Large Language Models, ICLR 2025.
    """

    kinds = ("carving",)
    summary = (
        "lets each token read only the weight columns that matter to it, and a low-rank approximation for the rest"
    )
    citation = "Zhang et al., R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference, ICLR 2025"
    url = "https://arxiv.org/abs/2504.19449"
    needs_calibration: ClassVar[bool] = True
    invalidates: ClassVar[frozenset[Capability]] = frozenset({"linear_weights", "matrix_products"})
    module_types: ClassVar[tuple[type[SparseLinear], ...]] = (SparseLinear,)

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    alpha: Share | Literal["error"] | dict[str, Share] = ALPHA
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

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        changed = non_default_fields(self)
        absent = ["alpha", "search", "scale", "low_rank", "rank", "strict"] if self.how != "r_sparse" else []
        for name in [*absent, "threshold"] if self.how == "cats" else absent:
            if name in changed:
                raise ValueError(f"how is {self.how!r}, which has no {name}")
        if self.allocation == "greedy" and (self.how != "teal" or self.threshold != "static"):
            raise ValueError("allocation: greedy belongs to how: teal with threshold: static")
        if "fraction" in changed and self.mode != "last_fraction":
            raise ValueError("fraction belongs to mode: last_fraction")
        if self.alpha == "error" and self.search is not None:
            raise ValueError("alpha: error and search are two ways to choose alpha; leave one out")
        for name in ("search", "rank"):
            if not self.low_rank and name in changed:
                raise ValueError(f"low_rank is false, so there is no {name}")
        if not self.low_rank and self.alpha == "error":
            raise ValueError("low_rank is false, so alpha is a number; error weighs columns against a rank")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the setting of the authors' code.

        Searched splits, thresholds from 512 tokens, and the last tenth of a prompt sparse.
        """
        return cls(
            **{"search": Search(population=32), "tokens": 512, "mode": "last_fraction", "scale": None, **overrides}
        )

    @classmethod
    def teal(cls, **overrides: Any) -> Self:
        """Return TEAL: every input whose |x| is above a threshold, and nothing of the others."""
        return cls(**{"how": "teal", **overrides})

    @classmethod
    def cats(cls, **overrides: Any) -> Self:
        """Return CATS: units of a gated feed-forward whose gate is above a threshold."""
        return cls(**{"how": "cats", **overrides})

    @property
    def long(self) -> bool:
        """Whether it may take so long that it can be resumed."""
        return self.search is not None

    @property
    def patterns(self) -> dict[str, Sequence[str]]:
        """The names and patterns of all fields that select projections, `alpha` included."""
        return {**super().patterns, "alpha": list(self.alpha) if isinstance(self.alpha, dict) else []}

    @property
    def budget_spec(self) -> BudgetSpec:
        """The fields that decide sizes."""
        return BudgetSpec(self.low_rank, self.rank, self.strict)

    def _start_alpha(self, name: str) -> float:
        """Return the alpha of a projection before any search."""
        return 1.0 if self.how == "teal" or self.alpha == "error" else alpha_of(name, self.alpha, ALPHA)

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Refuse names that match none of the projections `(name, rows, columns)`, and ranks above the width."""
        names = set(self.target_names([name for name, _, _ in linears]))
        for name, outputs, inputs in linears:
            if name in names and self.how == "r_sparse":
                self.budget_spec.split(name, outputs, inputs, self.sparsity, self._start_alpha(name))

    def check_model(self, parts: Anatomy) -> None:
        """Refuse, before any work, a model that lacks what the fields need."""
        shapes = {name: linear.shape for name, linear in parts.all_linears()}
        self.check([(name, *shape) for name, shape in shapes.items()])
        names = self.plan(parts.model)
        able = predicts_next(parts)
        if self.search is not None and not able:
            raise IntaglioError("search needs the loss of the next token, which this model does not predict")
        if self.mode != "all" and not able:
            raise IntaglioError(f"mode is {self.mode}, and this model generates nothing after a prompt")
        if self.how == "cats":
            mlps = cats.gated_mlps(parts, names)
            cats.unit_sparsity(self.sparsity, {name: shapes[name] for name in names}, mlps.values())

    def estimate(self, workload: Workload) -> Cost:
        """Return the cost of the calibration pass, the selections, the decompositions and a search."""
        tokens = min(self.tokens, workload.tokens)
        flops = 2.0 * workload.block_parameters * workload.tokens
        extra = tokens * max(columns for _, columns in workload.linears) * 8
        if self.low_rank and (self.alpha != 1 or self.search is not None or self.rank is not None):
            flops += sum(FLOPS * min(shape) ** 2 * float(max(shape)) for shape in workload.linears)
            extra += int(workload.block_parameters * (1 - self.sparsity) * workload.element_size)
        if self.search is not None:
            searched = min(workload.tokens, self.search.segments * LENGTH)
            flops += 3.0 * self.search.evaluations * workload.parameters * searched
        if self.allocation == "greedy":
            flops += teal.PASSES * 2.0 * workload.block_parameters * min(workload.tokens, teal.SEGMENTS * LENGTH)
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
            batch_size: sequences of a pass. Default 4.
            progress: called after each batch and each evaluation of a search.
            directory: where a search caches losses. Default: nowhere.
            resume: whether it resumes from there. Default False.

        Raises:
            IntaglioError: see the class.
        """
        model = checkpoint.model
        self.check_model(anatomy(model))
        data, names = as_segments(checkpoint, calibration, SAMPLES, LENGTH, seed), self.plan(model)
        capture: dict[str, Any] = {"tokens": self.tokens, "batch_size": batch_size, "progress": progress}
        cuts: dict[str, float] = {}
        if self.how == "cats":
            layers, cuts, chosen = calibrate.apply_cats(checkpoint, data, names, self.sparsity, **capture)
        elif self.allocation == "greedy":
            layers, chosen = calibrate.apply_teal(checkpoint, data, names, self.sparsity, **capture)
        else:
            scale = False if self.how == "teal" else self.scale
            spec = OptionSpec(self.budget_spec, self.sparsity, scale, self.threshold == "topk")
            start = {name: self._start_alpha(name) for name in names}
            resuming: dict[str, Any] = {"seed": seed, "directory": directory, "resume": resume}
            chooser: Search | Literal["error"] | None = "error" if self.alpha == "error" else self.search
            layers, chosen = calibrate.apply_rsparse(checkpoint, data, start, spec, chooser, **resuming, **capture)
        _finish(model, self.mode, self.fraction)
        identity = {"digest": data.digest, "samples": data.n, "length": data.length, "batch_size": batch_size}
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, calibration=identity, chosen=chosen)
        rules = {
            name: {
                "threshold": layer.rule.threshold,
                "channels": layer.rule.channels,
                "scaled": layer.rule.scaled,
                "rank": layer.rank,
            }
            for name, layer in layers.items()
        }
        part = {"layers": rules, "cuts": cuts, "mode": self.mode, "fraction": self.fraction}
        checkpoint.set_runtime_state(self.slug, {**part, "weights": calibrate.weight_fingerprints(model)})
        return checkpoint

    @classmethod
    def build_empty(cls, part: Mapping[str, Any], model: nn.Module) -> None:
        """Put empty layers into a model without weights."""

        def empty(name: str, linear: Linear) -> SparseLinear:
            (outputs, inputs), layer, stock = linear.shape, part["layers"][name], linear.module
            rule = InputRule(layer["threshold"], layer["channels"], layer["scaled"])
            conv, dtype = calibrate.transposed(linear), stock.weight.dtype
            return SparseLinear(
                inputs, outputs, layer["rank"], stock.bias is not None, rule, conv, device="meta", dtype=dtype
            )

        replace_linears(model, part["layers"], empty)
        cats.put_thresholds(model, part["cuts"])

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Set which tokens of a loaded model are dense.

        Raises:
            IntaglioError: the thresholds were calibrated on other weights.
        """
        if calibrate.weight_fingerprints(checkpoint.model)[0] not in part["weights"]:
            raise IntaglioError(
                f"the thresholds in the record of {checkpoint.source or 'this checkpoint'} were calibrated on another "
                f"model than the one beside it; apply r_sparse to that one again"
            )
        _finish(checkpoint.model, part["mode"], part["fraction"])


def _finish(model: nn.Module, mode: Mode, fraction: float) -> None:
    """Freeze the sparse layers, and set which tokens of a prompt are dense, instead of an earlier setting.

    Thresholds and factors belong to the weights as they are, so none of them is trained.
    """
    base = anatomy(model).base
    for key, hook in list(base._forward_pre_hooks.items()):
        if isinstance(hook, DensePrefill):
            del base._forward_pre_hooks[key]
            base._forward_pre_hooks_with_kwargs.pop(key, None)
    prefill = None if mode == "all" else DensePrefill(mode, fraction)
    if prefill is not None:
        base.register_forward_pre_hook(prefill, with_kwargs=True)
    for module in model.modules():
        if isinstance(module, (SparseLinear, ThresholdedActivation)):
            module.prefill = prefill
        if isinstance(module, SparseLinear):
            module.requires_grad_(False)
    share_inputs(model)
    use_in_passes(model)
