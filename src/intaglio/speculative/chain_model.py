"""Reading of models that cannot read a branching tree: chains, one row at a time.

Some families take positions or masks from the cache's length, whatever they are given (Bart, BLOOM, GPT-Neo); others
keep a recurrent state that cannot be cropped (Mamba and its hybrids). For them the loop keeps the first child of every
node. A rejected token is cropped from keys and values; a recurrent state is put back to that before the pass, and the
accepted tokens are read again together with the next chain, so that nothing costs a pass of its own.

Dimension letters: Q tokens of a pass, P prompt tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from intaglio.errors import IntaglioError, first_line
from intaglio.modeling.anatomy import Anatomy
from intaglio.speculative._utils import vocabulary_size
from intaglio.speculative.cache import TREE_LAYERS, other_layer
from intaglio.speculative.prepacked_linear import Prepacked
from intaglio.speculative.request import Request
from intaglio.speculative.target_model import CachedModel, Inputs, TreeRefused, check_tree_attention
from intaglio.speculative.tree import TokenTree

REREAD = 8
"""From this many tokens on that are read again, a pass has no drafted ones."""

_RECURRENT: Any = cache_utils.LinearAttentionCacheLayerMixin
_INDEXED: Any = getattr(cache_utils, "DynamicIndexedLayer", DynamicLayer)  # as a version before 5.24 has not
_CHAIN_LAYERS = (
    *TREE_LAYERS,
    _INDEXED,
    cache_utils.LinearAttentionLayer,
    cache_utils.LinearAttentionAndFullAttentionLayer,
    getattr(cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", DynamicLayer),
)


class CachedChainModel(CachedModel):
    """A model with its cache that reads chains; see `CachedModel`.

    Attributes:
        refusal: the sentence that says why it reads no trees.
    """

    def __init__(
        self, model: Any, cache: DynamicCache, refusal: str, hidden: bool = False, prepacked: Prepacked | None = None
    ) -> None:
        self.refusal = refusal
        super().__init__(model, cache, hidden, prepacked)
        self._again: list[int] = []  # accepted tokens that the state has not read
        self._tokens: list[int] = []
        self._states: list[tuple[Any, dict[int, Tensor | None], dict[int, Tensor | None]]] = []

    def _prepare(self, parts: Anatomy) -> None:
        if any(type(layer) not in _CHAIN_LAYERS for layer in self.cache.layers):
            raise IntaglioError(self.refusal)

    def prefill(self, ids_BP: Tensor, mask_BP: Tensor | None = None) -> Tensor:
        """See `CachedModel.prefill`; without padding.

        Raises:
            IntaglioError: several rows, padding, or a cache that holds the whole prompt or an unknown part of it.
        """
        if len(ids_BP) > 1 or (mask_BP is not None and not bool(mask_BP.all())):
            raise IntaglioError(f"{self.refusal}; it drafts chains instead, for one row without padding")
        kept = [layer.get_seq_length() for layer in self.cache.layers if isinstance(layer, DynamicLayer)]
        recurrent = [layer for layer in self.cache.layers if isinstance(layer, _RECURRENT)]
        past = max(kept, default=0)
        if past >= ids_BP.shape[1] or (not kept and any(any(x.has_previous_state.values()) for x in recurrent)):
            raise IntaglioError(
                "the cache holds the whole prompt or an unknown part of it; give the whole sequence, with at least one "
                "token that the cache does not hold"
            )
        few = {"logits_to_keep": 1} if self._keeps_few else {}
        logits = self._call(input_ids=ids_BP[:, past:], **few)
        for layer in self.cache.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.activate_past_recording()
        self.lengths, self.pads = [ids_BP.shape[1]], [0]
        return logits[:, -1]

    def prepare_inputs(self, tokens_BQ: Any, depths_BQ: Any, seen_BQR: Any) -> Inputs:
        """Return the tokens of a chain; the model makes positions and masks itself."""
        tokens = torch.as_tensor(tokens_BQ, dtype=torch.long, device=self.model.device)
        return Inputs(tokens, torch.as_tensor(depths_BQ), torch.as_tensor(seen_BQR), None)

    def forward(self, inputs: Inputs) -> Tensor:
        """See `CachedModel.forward`."""
        self._tokens = inputs.tokens_BQ[0].tolist()
        self._states = [
            (layer, _copies(layer.conv_states), _copies(layer.recurrent_states))
            for layer in self.cache.layers
            if isinstance(layer, _RECURRENT) and len(self._tokens) > 1
        ]
        again = len(self._again)
        logits_BQV = self._call(input_ids=torch.tensor([self._again + self._tokens], device=self.model.device))
        if self.hidden_BQD is not None:
            self.hidden_BQD = self.hidden_BQD[:, again:]
        return logits_BQV[:, again:]

    def commit(self, inputs: Inputs) -> None:
        """Count the tokens of a pass as pending."""
        self.pending += inputs.tokens_BQ.shape[1]

    def fit(self, tree: TokenTree, unread: int, drafted: int) -> TokenTree:
        """Return the first path of a tree, with the `unread` tokens and at most `drafted` others."""
        path = [0]
        while children := tree.children[path[-1]]:
            path.append(children[0])
        most = 0 if len(self._again) >= REREAD else drafted
        return tree.subtree(path).truncate(unread - 1 + most)

    def keep_rows(self, kept: Any) -> None:
        """See `CachedModel.keep_rows`; the tokens kept are the first ones."""
        count = len(kept[0])
        rejected = len(self._tokens) - count
        if rejected and self._states:
            rejected = len(self._again) + len(self._tokens)
            self._again += self._tokens[:count]
        else:
            self._again = []
        for layer in self.cache.layers:
            _crop(layer, rejected)
        for layer, conv_states, recurrent_states in self._states if rejected else ():
            layer.conv_states, layer.recurrent_states = conv_states, recurrent_states
        self.lengths = [self.lengths[0] + count]
        self.pending, self._states = 0, []

    def close(self) -> None:
        """Read the accepted tokens that the state lacks, for a cache that outlives the run."""
        if self._again:
            self._call(input_ids=torch.tensor([self._again], device=self.model.device))
            self._again = []


def _copies(states: dict[int, Tensor | None]) -> dict[int, Tensor | None]:
    return {index: None if state is None else state.clone() for index, state in states.items()}


def _crop(layer: Any, count: int) -> None:
    """Drop the last `count` keys and values of a layer, and what a recording layer need not hold."""
    kinds = (_INDEXED, DynamicSlidingWindowLayer, DynamicLayer)
    own = next((kind for kind in kinds if isinstance(layer, kind)), None)
    if own is not None:
        own.crop(layer, -count)
    if isinstance(layer, _RECURRENT) and layer.record_past:
        _RECURRENT.crop(layer, 0)


_REFUSED: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()
"""Models that read chains alone: by attention implementation, the sentence that says why."""


def open_cached_model(model: Any, request: Request, hidden: bool, prepacked: Prepacked | None) -> CachedModel:
    """Return a target with its cache that reads trees, or chains if it cannot read trees.

    Raises:
        IntaglioError: it can read neither, or a cache of another kind of model was given.
    """
    refused = _REFUSED.setdefault(model, {})
    if model.config._attn_implementation not in refused:
        try:
            cached = CachedModel(model, request.cache, hidden, prepacked)
            check_tree_attention(model, request.max_length)
            return cached
        except TreeRefused as error:
            if other_layer(request.given) != other_layer(_new_cache(model)):
                raise
            _check_chains(model, str(error))
            refused[model.config._attn_implementation] = str(error)
    return CachedChainModel(model, request.given, refused[model.config._attn_implementation], hidden, prepacked)


def _new_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


@torch.inference_mode()
def _check_chains(model: Any, refusal: str) -> None:
    """Raise an `IntaglioError` if logits after a rejected draft differ from those of one token after the other.

    As in `check_tree_attention`, one attempt of three within the tolerance is enough.
    """
    tolerance = 0.01 + 12 * torch.finfo(model.dtype).eps
    for seed in range(3):
        try:
            if _chain_error(model, refusal, seed) < tolerance:
                return
        except IntaglioError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
            raise IntaglioError(f"{refusal}; nor can it read a chain: {first_line(error)}") from error
    raise IntaglioError(f"{refusal}; nor does it read several tokens at once as it reads one after the other")


def _chain_error(model: Any, refusal: str, seed: int) -> float:
    """Return the relative difference of logits after rejections from those of stock decoding."""
    ids = torch.randint(vocabulary_size(model), (16,), generator=torch.Generator().manual_seed(seed)).tolist()
    logits = []
    for passes in (
        [(ids[8:11], 3), ([ids[11], *ids[:3]], 1), (ids[12:15], 3)],  # of each pass that many are kept
        [([token], 1) for token in ids[8:15]],
    ):
        cached = CachedChainModel(model, _new_cache(model), refusal)
        cached.prefill(torch.tensor([ids[:8]], device=model.device))
        rows = []
        for tokens, kept in passes:
            inputs = cached.prepare_inputs([tokens], [range(len(tokens))], [])
            rows.append(cached.forward(inputs)[0, :kept].double())
            cached.commit(inputs)
            cached.keep_rows([range(kept)])
        logits.append(torch.cat(rows))
    return float((logits[0] - logits[1]).norm() / logits[1].norm())
