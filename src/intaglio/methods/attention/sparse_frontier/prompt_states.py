"""States of a prompt that was read once, dense, from which the cache of any policy is made.

Dimension letters: H query heads, G key-value heads, N tokens of the prompt, W last queries, D width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from intaglio.errors import IntaglioError
from intaglio.methods.attention.sparse_frontier.cache import Policy, SequenceCache, SparseLayer
from intaglio.methods.attention.sparse_frontier.installation import install, uninstall
from intaglio.methods.attention.sparse_frontier.prefill import SinkWindow
from intaglio.modeling.anatomy import CACHE, anatomy

QUERIES = 256
"""Last queries of the prompt by which a policy may score keys."""


class _Recording(Policy):
    """Policy that keeps every key and records the queries by which others decide."""

    name: Literal["recording"] = "recording"
    _queries: list[Tensor] = PrivateAttr(default_factory=list)

    def keep(self, query_HND: Tensor, key_GND: Tensor, scale: float) -> list[Tensor] | None:
        """Record the last queries; keep everything."""
        self._queries.append(query_HND[:, -QUERIES:].clone())
        return None


@dataclass(frozen=True, eq=False)
class PromptStates:
    """States of each layer after a prompt.

    Args:
        layers: last queries [H, W, D], keys and values [G, N, D] and the factor of the scores, of the layers without a
            sliding window in order.
        windowed: stock cache layers of those with one, by index. Default: none.
    """

    layers: tuple[tuple[Tensor, Tensor, Tensor, float], ...]
    windowed: Mapping[int, CacheLayerMixin] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.layers[0][1].shape[1]

    def cache(self, policy: Policy) -> DynamicCache:
        """Return the cache of a policy after the prompt; layers with a sliding window keep their stock layers."""
        cache, recorded = DynamicCache(), iter(self.layers)
        for index in range(len(self.layers) + len(self.windowed)):
            if index in self.windowed:
                cache.layers.append(deepcopy(self.windowed[index]))
                continue
            query, key, value, scale = next(recorded)
            layer = SparseLayer(policy, index)
            layer.update(key[None], value[None])
            layer.sequences.append(SequenceCache(policy, query, key, value, scale, index))
            cache.layers.append(layer)
        return cache


@torch.no_grad()
def read_prompt(model: Any, ids: Tensor) -> PromptStates:
    """Read a prompt [1, N] with dense attention.

    Raises:
        IntaglioError: more than one row, or a model whose layers all have sliding windows.
    """
    parts, recording = anatomy(model), _Recording()
    windows = {index: window for index, window in enumerate(parts.windows) if window is not None}
    full = [index for index in range(len(parts.blocks)) if index not in windows]
    if len(ids) != 1 or not full:
        raise IntaglioError("states are recorded of one row, in a model with layers without a sliding window")
    # All of a window's keys, tile by tile: stock attention masks all pairs of a long prompt.
    window = SinkWindow(budget=max(windows.values()), sinks=0) if windows else None
    installation = install(model, window, recording, list(windows), full)
    try:
        cache = installation.new_cache(parts.config)
        parts.base(ids, **{CACHE: cache}, use_cache=True)
    finally:
        uninstall(model)
    states = []
    for index, query in zip(full, recording._queries, strict=True):
        layer = cache.layers[index]
        assert isinstance(layer, SparseLayer)
        (sequence,) = layer.sequences
        (buffer,) = sequence.buffers
        states.append((query, buffer.keys[:, : buffer.length], buffer.values[:, : buffer.length], sequence.scale))
    return PromptStates(tuple(states), {index: cache.layers[index] for index in windows})
