"""The attention function of a layer, with its learned parts, and the layer of the cache that holds its spans.

Dimension letters: B batch rows, H query heads, G key heads, L positions, Q new positions, D head size, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from intaglio.errors import IntaglioError
from intaglio.masks import RULE, SCORE, MaskRequest
from intaglio.masks.attention_interface import ATTENTION
from intaglio.methods.attention.combiner.functional import Pool, document_rows
from intaglio.methods.attention.combiner.grid import (
    AxialMixture,
    BidirectionalMixture,
    Fixed,
    GridState,
    RowMajor,
    RowSummary,
    Tokens,
)
from intaglio.methods.attention.combiner.logn import BlockState, Logn

Variant = Literal["fixed", "logn", "row_major", "mixture", "bidirectional_mixture"]
Activation = Literal["identity", "relu", "deepset"]


@dataclass(frozen=True)
class LayerConfig:
    """Fields of `Combiner` as they apply to a layer, and the sizes of its learned parts.

    Args:
        variant: as in `Combiner`, like all others but the last two.
        segment: columns of the grid; 0 for `logn`, which has none.
        head_size: D of the keys.
        shape: of the learned part: H times the size of what is summarised, W, and H · D.
    """

    variant: Variant
    segment: int
    activation: Activation
    pool: Pool
    row_summary: RowSummary
    size_bias: bool
    head_size: int
    shape: tuple[int, int, int]


class CombinerAttention(nn.Module):
    """Combiner as the attention function of one layer; a submodule of its attention module."""

    takes_request = True
    """The mask is never built: padding and packed documents become rows of their own."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.config = config
        inputs, width, outputs = config.shape
        if config.activation == "deepset":
            self.query_in, self.key_in = (nn.Linear(config.head_size, config.head_size, bias=False) for _ in range(2))
        if config.variant == "row_major" and config.row_summary.endswith("proj"):
            self.summary_in = nn.Linear(inputs, width, bias=False)
            self.summary_norm = nn.LayerNorm(width, eps=1e-6)
            self.summary_out = nn.Linear(width, outputs, bias=False)
        self.form = self._form()
        self._call: tuple[Tensor | None, CombinerCacheLayer | None] = (None, None)

    def _form(self) -> Fixed | Logn:
        own = self.config
        if own.variant == "logn":
            return Logn(own.pool, own.size_bias)
        if own.variant == "row_major":
            return RowMajor(own.segment, own.size_bias, own.row_summary, self.project)
        forms = {"fixed": Fixed, "mixture": AxialMixture, "bidirectional_mixture": BidirectionalMixture}
        return forms[own.variant](own.segment, own.pool, own.size_bias)

    def draw(self, generator: torch.Generator) -> None:
        """Draw the learned matrices by Xavier's uniform rule, as the official code does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                drawn = torch.empty(module.weight.shape)
                nn.init.xavier_uniform_(drawn, generator=generator)
                module.weight.data.copy_(drawn)

    def attach(self, module: nn.Module) -> None:
        """Become the attention function of an attention module, and follow its calls for its input and its cache."""
        setattr(module, ATTENTION, self)
        module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if getattr(module, ATTENTION, None) is not self:  # removed, or replaced for a while
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        self._call = (hidden, cache_layer(caches[0], module.layer_idx) if caches else None)  # type: ignore[arg-type]

    def activate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys after the activation of the pooling."""
        if self.config.activation == "identity":
            return query, key
        if self.config.activation == "deepset":
            query, key = self.query_in(query), self.key_in(key)
        return F.relu(query), F.relu(key)

    def project(self, summary: Tensor, hidden: Tensor, dropout: float) -> Tensor:
        """Return W2 LN(x + Dropout(W1 y)) [B, H, R, C, D] of summaries y, for hidden states x [B, R, C, W]."""
        heads = summary.permute(0, 2, 3, 1, 4)
        into = F.dropout(self.summary_in(heads.flatten(3)), dropout)
        keys = self.summary_out(self.summary_norm(hidden + into)).unflatten(-1, (heads.shape[3], -1))
        return keys.permute(0, 3, 1, 2, 4)

    def forward(
        self,
        module: nn.Module,
        query_BHQD: Tensor,
        key_BGQD: Tensor,
        value_BGQD: Tensor,
        mask: Any,
        base: str,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """Return the outputs [B, Q, H, D], and None for the weights, which have no dense form; `base` is ignored.

        Raises:
            IntaglioError: the layer has a visibility rule as well, or the mask or the scores are not plain.
        """
        (hidden, cached), self._call = self._call, (None, None)
        if getattr(module, RULE, None) is not None or getattr(module, SCORE, None) is not None:
            raise IntaglioError("a layer of combiner cannot have a visibility rule as well; clear_visibility first")
        if not isinstance(mask, MaskRequest):
            raise IntaglioError("combiner makes its own masks; pass a 2-D attention_mask [rows, tokens]")
        if softcap is not None or more.get("s_aux") is not None:
            raise IntaglioError("combiner does not cap scores and has no learned sinks, which this layer has")
        groups = query_BHQD.shape[1] // key_BGQD.shape[1]
        query = query_BHQD * (query_BHQD.shape[-1] ** -0.5 if scaling is None else scaling)
        key, value = (x.repeat_interleave(groups, 1) for x in (key_BGQD, value_BGQD))
        real = torch.ones(1, query.shape[2], dtype=torch.bool, device=query.device)
        keeps_hidden = self.config.variant == "row_major"
        x = Tokens(
            query, key, value, hidden if keeps_hidden else None, *self.activate(query, key), real, groups,
            dropout if module.training else 0.0,
        )  # fmt: skip
        documents = mask.documents(query.device)
        output = self._read(x, documents) if cached is None else self._cached(x, documents, cached)
        return output.transpose(1, 2).contiguous(), None

    def _read(self, x: Tokens, documents: Tensor | None, keep: bool = False) -> Any:
        """Return the outputs [B, H, L, D] of whole sequences, with `keep` the state after them too."""
        if documents is None:
            both = self.form.parallel(x, keep)
            return both if keep else both[0]
        places, real = document_rows(documents)
        rows = _each(x, lambda t: t.transpose(1, 2).flatten(0, 1)[places].transpose(1, 2))
        if x.hidden is not None:
            rows = replace(rows, hidden=x.hidden.flatten(0, 1)[places])
        output, state = self.form.parallel(replace(rows, real=real), keep)
        back = output.new_zeros(documents.numel(), *output.shape[1::2])
        back[places[real]] = output.transpose(1, 2)[real]
        whole = back.unflatten(0, documents.shape).transpose(1, 2)
        return (whole, state) if keep else whole

    def _cached(self, x: Tokens, documents: Tensor | None, cached: CombinerCacheLayer) -> Tensor:
        """Return the outputs [B, H, Q, D] of new tokens after those of the cache, and append them to it."""
        if cached.state is None:
            output, cached.state = self._read(x, documents, keep=True)
            return output
        outputs = []
        for place in range(x.query.shape[2]):
            own = slice(place, place + 1)
            real = x.real[:, own] if documents is None else documents[:, own] >= 0
            token = replace(
                _each(x, lambda t, own=own: t[:, :, own]),  # type: ignore[misc]
                hidden=None if x.hidden is None else x.hidden[:, own],
                real=real,
            )
            with torch.no_grad():
                outputs.append(self.form.step(token, cached.state, self.activate))  # type: ignore[arg-type]
        return torch.cat(outputs, 2)


def _each(x: Tokens, change: Callable[[Tensor], Tensor]) -> Tokens:
    """Return tokens with their queries, keys and values, and the pools of them, changed."""
    names = ("query", "key", "value", "pooled_query", "pooled_key")
    return replace(x, **{name: change(getattr(x, name)) for name in names})  # type: ignore[arg-type]


class CombinerCacheLayer(CacheLayerMixin):
    """Layer of a stock `DynamicCache` that holds spans and the tokens of unfinished ones.

    `update` returns the new keys and values alone; the attention function appends them.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.state: GridState | BlockState | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first call makes the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new tokens, padding included, and return them."""
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the mask over all tokens."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors."""
        sizes: list[int] = []
        self._change(lambda x: sizes.append(x.numel() * x.element_size()) or x)  # type: ignore[func-returns-value]
        return sum(sizes)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every stored tensor; the first dimension of each are the batch rows."""
        state: Any = self.state
        for field in fields(state) if state is not None else ():
            known = getattr(state, field.name)
            new = {name: change(x) for name, x in known.items()} if isinstance(known, dict) else change(known)
            setattr(state, field.name, new)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch rows, for beam search."""
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows."""
        self._change(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        self._change(lambda x: x.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        """Forget all tokens."""
        self.seen, self.state = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens: finished spans keep nothing that could be taken apart."""
        if tokens_to_remove:
            raise IntaglioError("tokens cannot be removed from a cache of combiner; generate without drafts")


def cache_layer(cache: Cache, index: int) -> CombinerCacheLayer:
    """Return our layer of a cache; an unused stock layer is replaced by it.

    Raises:
        IntaglioError: the cache is not a plain `DynamicCache`, or was filled by stock attention.
    """
    if not isinstance(cache, DynamicCache) or cache.offloading:
        raise IntaglioError(
            f"combiner keeps spans in a DynamicCache that is not offloaded, not in a {type(cache).__name__}; leave"
            " cache_implementation out"
        )
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if isinstance(layer, CombinerCacheLayer):
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.get_seq_length():
        raise IntaglioError(
            f"layer {index} of the cache holds the keys of stock attention ({type(layer).__name__}); start with an"
            " empty DynamicCache"
        )
    cache.layers[index] = own = CombinerCacheLayer()
    return own
