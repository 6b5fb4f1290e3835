"""SparseFrontier: training-free sparse attention and key-value compression (Nawrot et al. 2025).

    output_i = softmax over the kept keys j of (q_i k_j / sqrt D) v_j

- `prefill`: patterns for the prompt; `tiled_attention`: attention over their indices.
- `cache`: cache policies for decoding.
- `installation`: attention functions and hooks in a model.
- `study`: tasks, budgets, and the analysis of a model; `pictures`: what the heads kept.

Where the paper's card and the official code could differ, this follows the code: Quest's budget counts complete pages
before the current one, FlexPrefill is its adaptive vertical-slash, slashes are computed as tiles. The code rounds the
weights to the keys' dtype before pooling, which is left out. Batches, padding and windows are added here.

Source: Nawrot, Li, Huang, Ruder, Marchisio and Ponti, The Sparse Frontier: Sparse Attention Trade-offs in Transformer
LLMs, 2025, arXiv 2504.17768; code PiotrNawrot/sparse-frontier. The methods: MInference (Jiang et al. 2024), FlexPrefill
(Lai et al. 2025), Quest (Tang et al. 2024), SnapKV (Li et al. 2024), Ada-KV (Feng et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.masks.method import layer_numbers
from intaglio.methods.attention.sparse_frontier.cache import (
    AdaSnapKV,
    CachePolicy,
    OraclePolicy,
    Quest,
    RandomPolicy,
    SinkWindowPolicy,
    SnapKV,
    cache_bytes,
)
from intaglio.methods.attention.sparse_frontier.installation import Installation, install, installed, uninstall
from intaglio.methods.attention.sparse_frontier.prefill import (
    BlockSparse,
    FlexPrefill,
    Oracle,
    Prefill,
    Random,
    SinkWindow,
    VerticalSlash,
)
from intaglio.methods.attention.sparse_frontier.tiled_attention import Meter
from intaglio.methods.base import (
    Capability,
    Cost,
    Method,
    ModelAspect,
    Progress,
    Workload,
    no_progress,
    validation_sentence,
)
from intaglio.modeling.anatomy import Anatomy, anatomy, has_plain_scores

__all__ = [
    "AdaSnapKV",
    "BlockSparse",
    "FlexPrefill",
    "Meter",
    "Oracle",
    "OraclePolicy",
    "Quest",
    "Random",
    "RandomPolicy",
    "SinkWindow",
    "SinkWindowPolicy",
    "SnapKV",
    "SparseFrontier",
    "VerticalSlash",
    "cache_bytes",
    "installed",
    "named",
    "uninstall",
]

NAMES: dict[str, Callable[[int | None], dict[str, Any]]] = {
    "vertical_slash": lambda budget: {"prefill": _with("vertical_slash", columns=budget, offsets=budget)},
    "block_sparse": lambda budget: {"prefill": _with("block_sparse", blocks=budget and budget // 16)},
    "flex_prefill": lambda budget: {"prefill": _with("flex_prefill", min_budget=budget)},
    **{
        name: lambda budget, name=name: {"cache": _with(name, budget=budget)}  # type: ignore[misc]
        for name in ("quest", "snapkv", "ada_snapkv", "sink_window", "random", "oracle")
    },
}
"""Fields of the method by the names that the command line accepts, given a budget in tokens."""


def _with(name: str, **fields: int | None) -> dict[str, Any]:
    return {"name": name, **{key: value for key, value in fields.items() if value is not None}}


def named(name: str, budget: int | None = None) -> SparseFrontier:
    """Return the method with one pattern or policy.

    Args:
        name: a key of `NAMES`; the baselines apply to decoding.
        budget: tokens: of a policy the keys read or kept, of vertical-slash the columns and as many offsets, of
            block-sparse 16 a block, of FlexPrefill the least budget. Default: the pattern's or policy's own.

    Raises:
        IntaglioError: an unknown name, or a budget below the forced tokens.
    """
    if name not in NAMES:
        raise IntaglioError(f"there is no sparse attention named {name!r}; {did_you_mean(name, NAMES)}")
    fields = NAMES[name](budget)
    try:
        return SparseFrontier(**fields)
    except ValidationError as error:
        where = "" if budget is None else f"budget {budget} of {name}: "
        raise IntaglioError(f"{where}{validation_sentence(error, SparseFrontier, fields)}") from error


class SparseFrontier(Method, slug="sparse_frontier"):
    """Sparse attention of a decoder without training: a pattern for the prompt, a policy for the key-value cache.

    Of the keys up to its own, each query of the prompt reads a pattern's selection, and each later token that of a
    policy:

        prefill  vertical_slash, block_sparse, flex_prefill; baselines sink_window, random, oracle
        cache    quest (reads pages, keeps all), snapkv, ada_snapkv (drop keys and free their memory); the baselines

    The softmax is over the kept keys alone. A budget of at least the context gives dense attention. Keys are selected
    after rotary embedding; positions count from the uncompressed length. The first pass over a sequence is its prompt,
    and a pass without a cache is one too, so a policy changes no logits there. Under a pattern, later passes are dense.
    Selecting policies decide for each token of a pass; after a compression new tokens are all kept.

    Layers with a sliding window keep their own cache, which is bounded already; a pattern applies within the window.
    Each row of a batch is treated alone and without its padding. Only a plain `DynamicCache` is accepted, which the
    policy fills; a static cache, and speculative decoding, which takes tokens back, are refused. The checkpoint needs
    `intaglio.load`.

    In a recipe: `sparse_frontier: {prefill: vertical_slash, cache: {name: quest, budget: 2048}}`. From Python:

        with intaglio.SparseFrontier(cache="snapkv").attached(model) as sparse:
            model.generate(**inputs)
        sparse.meter.decode_sparsity

    Args:
        prefill: pattern of the prompt, as a name or its fields with `name`; see `VerticalSlash`, `BlockSparse`,
            `FlexPrefill`, `SinkWindow`, `Random`, `Oracle`. Default: dense.
        cache: policy of the cache in the same way; see `Quest`, `SnapKV`, `AdaSnapKV`, `SinkWindowPolicy`,
            `RandomPolicy`, `OraclePolicy`. Default: dense. One of the two is needed.
        layers: `all` (default), a number, numbers, or a slice such as `"2:"`.

    Raises:
        IntaglioError: a budget below the forced tokens, an encoder, a policy for a layer with a sliding window, capped
            scores or learned sinks, a model whose queries and keys cannot be reached, and in use a cache of another
            kind, a 4-D mask or a context beyond the model's positions.

    Source: Nawrot et al., The Sparse Frontier, 2025, arXiv 2504.17768, appendix on the methods; code
    PiotrNawrot/sparse-frontier.
    """

    kinds = ("carving", "visibility")
    summary = "reads or keeps only the keys that matter in long contexts, by a pattern for the prompt or a cache policy"
    citation = "Nawrot et al., The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs, arXiv 2025"
    url = "https://arxiv.org/abs/2504.17768"

    storage: ClassVar[Literal["runtime"]] = "runtime"
    needs_calibration: ClassVar[bool] = False
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"attention"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"causal", "cache"})
    invalidates: ClassVar[frozenset[Capability]] = frozenset({"cache"})

    prefill: Annotated[Prefill, Field(discriminator="name")] | None = None
    cache: Annotated[CachePolicy, Field(discriminator="name")] | None = None
    layers: str | int | list[int] = "all"

    @field_validator("prefill", "cache", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        layer_numbers(value, 1 << 20)  # checks the format only: the depth is not known yet
        return value

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.prefill is None and self.cache is None:
            raise ValueError("prefill and cache are missing; one of them is needed")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return Quest, the method that the study finds best where it is feasible, with its budget of 1,024 tokens."""
        chosen: dict[str, Any] = {} if overrides.keys() & {"prefill", "cache"} else {"cache": Quest()}
        return cls(**chosen, **overrides)

    def plan(self, parts: Anatomy) -> tuple[list[int], list[int]]:
        """Return the layers with the pattern and those under the policy; refuse a model that does not fit."""
        kind = parts.config.model_type
        if not parts.causal:
            raise IntaglioError(f"{kind} is an encoder; sparse attention needs a decoder")
        chosen = layer_numbers(self.layers, len(parts.blocks))
        types = getattr(parts.config, "layer_types", None) or ["full_attention"] * len(parts.blocks)
        for index in chosen:
            if types[index] not in ("full_attention", "sliding_attention"):
                raise IntaglioError(
                    f"layer {index} of {kind} is {types[index]!r}; sparse attention needs softmax attention"
                )
            if not has_plain_scores(parts, index):
                raise IntaglioError(
                    f"layer {index} of {kind} caps its scores or has learned sinks; sparse attention supports neither"
                )
        cached = [index for index in chosen if parts.windows[index] is None] if self.cache is not None else []
        named_layers = self.layers != "all"
        if self.cache is not None and cached != chosen and (named_layers or not (cached or self.prefill)):
            layer = next(index for index in chosen if index not in cached)
            raise IntaglioError(
                f"layer {layer} has a sliding window of {parts.windows[layer]} tokens, to which its cache is bounded "
                f"already; {self.cache.name} needs layers without a window"
            )
        return chosen if self.prefill is not None else [], cached

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Accept any linears: they stay as they are."""

    def check_model(self, parts: Anatomy) -> None:
        """Refuse an encoder, and layers that do not exist or have a window where none may be."""
        self.plan(parts)

    def estimate(self, workload: Workload) -> Cost:
        """Return a cost of zero."""
        return Cost()

    def install(self, model: Any) -> Installation:
        """Install the sparse attention in a model until `uninstall`; returns its meter and observer."""
        layers = self.plan(anatomy(model))
        return install(model, self.prefill, self.cache, *layers)

    @contextmanager
    def attached(self, model: Any) -> Iterator[Installation]:
        """Install the sparse attention for a block of code."""
        installation = self.install(model)
        try:
            yield installation
        finally:
            uninstall(model)

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Install the sparse attention in `checkpoint`, in place of an earlier one, and return it."""
        self.install(checkpoint.model)
        checkpoint.set_runtime_state(self.slug, {"fields": self.model_dump()})
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed)
        return checkpoint

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Install the sparse attention of a record in a loaded model."""
        cls(**part["fields"]).install(checkpoint.model)
