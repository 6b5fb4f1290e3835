"""Combiner (Ren et al. 2021): attention to direct tokens and summarised spans, with every token in reach of every head.

- `functional`: pooling, spans, the joint softmax.
- `grid`: the variants on rows and columns; `logn`: the logarithmic variant.
- `layers`: the attention function of a layer, and its layer of the cache.

Official code: google-research/google-research, folder combiner (JAX and TensorFlow). Where its parts differ:

- The mixtures pool by a running maximum in JAX (here) and by a running sum in TensorFlow (`pool: sum`).
- The bidirectional mixture of TensorFlow leaves empty spans, at the border of the grid, in the softmax, with a key of 0
  and the mean of the whole axis as value. Here they are masked, as in the causal mixture.
- Dropout acts on the weights of the values of spans, and on those of a query's own segment in `fixed` and `row_major`,
  as in TensorFlow; `mixture` has none in either.
- Pooling other than the maximum, and activations, are there for `fixed` alone; here for every variant that pools.
- The learned part of `row_major` has no biases and Xavier's initialisation, as in JAX. Its dropout has the rate of the
  attention weights; in the official code, that of the residual stream, which stock decoders do not have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.masks import attention_functions, get_visibility, set_attention
from intaglio.masks.method import layer_numbers
from intaglio.methods.attention.combiner.functional import Pool
from intaglio.methods.attention.combiner.grid import RowSummary
from intaglio.methods.attention.combiner.layers import Activation, CombinerAttention, LayerConfig, Variant
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.modeling.anatomy import Anatomy, anatomy, attention, has_plain_scores

__all__ = ["Combiner", "CombinerAttention"]

PAPER_SEGMENT = 128
"""Segment of the official configurations, at 2,048 tokens."""


class Combiner(Method, slug="combiner"):
    """Replace full attention by direct tokens and summarised spans, at a cost of O(L √L) or O(L log L).

    The tokens that query i may see are split into direct ones D_i and spans S_r. One softmax runs over both:

        p(j|i) = [j in D_i] p~(j|i) + Σ_r [j in S_r] p(j|S_r) p~(S_r|i)
        p~(j|i) ∝ exp(q_i · k_j / √d),   p~(S|i) ∝ exp(q_i · k_S / √d),   p(j|S) = softmax_j(q_S · k_j / √d)
        k_S = max_{j in S} k_j,   q_S = max_{j in S} q_j   (elementwise),   v_S = Σ_j p(j|S) v_j
        out_i = Σ_{D_i} p~(j|i) v_j + Σ_S p~(S|i) v_S

    Every head still reaches every token, but a span has the weight of a single token. The variants choose D_i and S_r;
    with segments (rows) of m tokens:

    - `fixed`: own segment up to i; every earlier segment is a span. m + L/m items.
    - `logn`: token i alone; spans of 1, 2, 4, ... tokens by the binary expansion of i. log2 L + 1 items.
    - `row_major`: own segment; every earlier segment, summarised for i's place in its own (`row_summary`).
    - `mixture`: own segment and i's column of the grid; spans are the other columns above, and both sides of each
      earlier segment. 3 L/m + 2 m items.
    - `bidirectional_mixture`: for encoders; own row and column, and the running spans of four directions.

    Weights are kept and must be fine-tuned: `combiner: {}` and then a `train` step. Rotary positions are applied before
    the pooling, so that keys of spans mix the rotations of their tokens; the paper used learned positions. Padding and
    packed documents are separated. Generation appends to layers of a stock `DynamicCache` that hold the unfinished
    segment and the spans; `logn` and `mixture` keep all keys and values as well, `row_major` a summary for every token.
    Tokens appended to a cache have no gradients. The checkpoint needs `intaglio.load`.

    Source: Ren et al., Combiner: Full Attention Transformer with Sparse Computation Cost, NeurIPS 2021; differences
    between paper and code are listed in `intaglio.methods.attention.combiner`.

    Args:
        variant: `fixed` (default), `logn`, `row_major`, `mixture` or `bidirectional_mixture`, see above.
        segment: m, tokens of a segment; not for `logn`. Default: the smallest power of two from the square root of the
            model's context on.
        layers: `all` (default), a number, numbers, or a slice such as `"16:"`.
        window: layers with a sliding window are left alone (`keep`, default) or lose it (`drop`).
        activation: of queries and keys before the pooling: `identity` (default), `relu`, or `deepset`, a learned matrix
            and ReLU.
        pool: `max` (default), `mean` or `sum`.
        row_summary: keys of `row_major`: learned (`proj`, default), keys averaged by the weights of the values
            (`wsum`), that average through the learned part (`wsum_proj`), or the tokens' own keys (`none`).
        size_bias: whether log |S| is added to the scores of spans; the paper has no such term. With equal keys, all
            tokens then have equal weights, except in the mixtures, which cover tokens twice. Default False.

    Raises:
        IntaglioError: (in `apply`) a causal variant on an encoder or the reverse, a layer with a sliding window is
            named, no layer is left, a layer has a visibility rule, capped scores or sinks, or the model does not call
            transformers' attention interface.
    """

    kinds = ("carving", "visibility")
    summary = "lets every head attend to all tokens at sub-quadratic cost, through summaries of spans"
    citation = "Ren et al., Combiner: Full Attention Transformer with Sparse Computation Cost, NeurIPS 2021"
    url = "https://arxiv.org/abs/2107.05768"

    storage: ClassVar[Literal["runtime"]] = "runtime"
    needs_calibration: ClassVar[bool] = False
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"attention"})
    invalidates: ClassVar[frozenset[Capability]] = frozenset({"cache"})

    variant: Variant = "fixed"
    segment: Annotated[int, Field(ge=1)] | None = None
    layers: str | int | list[int] = "all"
    window: Literal["keep", "drop"] = "keep"
    activation: Activation = "identity"
    pool: Pool = "max"
    row_summary: RowSummary = "proj"
    size_bias: bool = False

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        layer_numbers(value, 1 << 20)  # checks the format only: the depth is not known yet
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.variant == "logn" and self.segment is not None:
            raise ValueError(f"segment is {self.segment}; the variant logn has none")
        if self.variant == "row_major" and (self.pool, self.activation) != ("max", "identity"):
            raise ValueError("pool and activation are given; the variant row_major pools nothing, leave them out")
        if self.variant != "row_major" and self.row_summary != "proj":
            raise ValueError(f"row_summary is {self.row_summary}; the variant {self.variant} has none")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the method with the segment of the official configurations."""
        own = {} if overrides.get("variant") == "logn" else {"segment": PAPER_SEGMENT}
        return cls(**{**own, **overrides})

    def chosen_layers(self, parts: Anatomy) -> list[int]:
        """Return the layers that are replaced.

        Raises:
            IntaglioError: see the class.
        """
        bidirectional = self.variant == "bidirectional_mixture"
        if parts.causal == bidirectional:
            kind = "a decoder" if parts.causal else "an encoder"
            other = "a causal variant" if parts.causal else "bidirectional_mixture"
            raise IntaglioError(f"variant is {self.variant}, and {parts.config.model_type} is {kind}; take {other}")
        layers = layer_numbers(self.layers, len(parts.blocks))
        windowed = [layer for layer in layers if parts.windows[layer] is not None]
        if windowed and self.window == "keep":
            if self.layers != "all" or len(windowed) == len(layers):
                raise IntaglioError(
                    f"layer {windowed[0]} has a sliding window of {parts.windows[windowed[0]]}, beyond which combiner"
                    " would see; leave it out of layers, or add window: drop"
                )
            layers = [layer for layer in layers if layer not in windowed]
        return layers

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Accept any linears: they stay as they are."""

    def check_model(self, parts: Anatomy) -> None:
        """Refuse, before any work, a model that does not fit."""
        rules, replaced = get_visibility(parts.model), attention_functions(parts.model)
        for layer in self.chosen_layers(parts):
            if layer in rules or layer in replaced:
                what = "a visibility rule" if layer in rules else "an attention function of another step"
                raise IntaglioError(f"layer {layer} has {what}, which combiner would replace")
            if not has_plain_scores(parts, layer):
                raise IntaglioError(f"layer {layer} caps its scores or has learned sinks, which combiner does not have")

    def estimate(self, workload: Workload) -> Cost:
        """Return a cost of zero: nothing is computed."""
        return Cost()

    def layer_config(self, config: Any, segment: int, module: nn.Module) -> LayerConfig:
        """Return the fields of a layer of a model, whose attention is `module`."""
        heads, width = int(config.num_attention_heads), int(config.hidden_size)
        # Latent attention has keys and values of sizes of its own.
        size = int(getattr(module, "qk_head_dim", None) or getattr(config, "head_dim", None) or width // heads)
        summary = int(getattr(module, "v_head_dim", None) or size) if self.row_summary == "proj" else size
        own = {name: getattr(self, name) for name in ("variant", "activation", "pool", "row_summary", "size_bias")}
        return LayerConfig(**own, segment=segment, head_size=size, shape=(heads * summary, width, heads * size))

    def segment_of(self, config: Any) -> int:
        """Return the segment for a model; 0 for `logn`."""
        if self.variant == "logn":
            return 0
        context = int(getattr(config, "max_position_embeddings", None) or PAPER_SEGMENT**2)
        return self.segment or 1 << math.ceil(math.log2(max(1, context)) / 2)

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Replace the attention of layers of `checkpoint` and return it; `seed` draws learned parts."""
        parts = anatomy(checkpoint.model)
        self.check_model(parts)
        layers, segment = self.chosen_layers(parts), self.segment_of(parts.config)
        part = {"fields": self.model_dump(), "segment": segment, "layers": layers}
        functions, generator = _functions(part, parts), torch.Generator().manual_seed(seed)
        like = next(parts.blocks[0].parameters())
        for function in functions.values():
            function.draw(generator)
            function.to(like.device, like.dtype).train(checkpoint.model.training)
        # Refuses a model without our attention interface, so it comes before the layers are changed.
        set_attention(checkpoint.model, {**attention_functions(checkpoint.model), **functions})
        _attach(functions, parts)
        earlier = [known for known in checkpoint.record.live if known.get("slug") == self.slug]
        groups = [group for known in earlier for group in known["groups"]]
        checkpoint.set_runtime_state(self.slug, {"groups": [*groups, part]})
        chosen = {"segment": segment, "layers": layers}
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, chosen=chosen)
        return checkpoint

    @classmethod
    def build_empty(cls, part: Mapping[str, Any], model: nn.Module) -> None:
        """Insert the recorded attention functions into a model without weights."""
        for group in part["groups"]:
            parts = anatomy(model)
            _attach(_functions(group, parts), parts)

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Switch the attention of a loaded model to the functions in it."""
        set_attention(checkpoint.model, attention_functions(checkpoint.model))


def _functions(part: Mapping[str, Any], parts: Anatomy) -> dict[int, CombinerAttention]:
    """Return new attention functions for the layers that a part of the record names."""
    method, modules = Combiner(**part["fields"]), {layer: attention(parts.blocks[layer]) for layer in part["layers"]}
    return {
        layer: CombinerAttention(method.layer_config(parts.config, part["segment"], module))
        for layer, module in modules.items()
    }


def _attach(functions: Mapping[int, CombinerAttention], parts: Anatomy) -> None:
    for layer, function in functions.items():
        function.attach(attention(parts.blocks[layer]))
