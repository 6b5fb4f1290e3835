"""States of a prompt that was read once, dense, from which the cache of any policy is made.

Dimension letters: H query heads, G key-value heads, N tokens of the prompt, W last queries, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor
from transformers.cache_utils import DynamicCache

from intaglio.errors import IntaglioError
from intaglio.methods.attention.sparse_frontier.cache import Policy, SequenceCache, SparseLayer
from intaglio.methods.attention.sparse_frontier.installation import install, uninstall
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
    """Last queries [H, W, D], keys and values [G, N, D] and the factor of the scores of each layer."""

    layers: tuple[tuple[Tensor, Tensor, Tensor, float], ...]

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.layers[0][1].shape[1]

    def cache(self, policy: Policy) -> DynamicCache:
        """Return the cache of a policy after the prompt."""
        cache = DynamicCache()
        for index, (query, key, value, scale) in enumerate(self.layers):
            layer = SparseLayer(policy, index)
            layer.update(key[None], value[None])
            layer.sequences.append(SequenceCache(policy, query, key, value, scale, index))
            cache.layers.append(layer)
        return cache


@torch.no_grad()
def read_prompt(model: Any, ids: Tensor) -> PromptStates:
    """Read a prompt [1, N] with dense attention.

    Raises:
        IntaglioError: a model with sliding windows, or more than one row.
    """
    parts, recording = anatomy(model), _Recording()
    if any(window is not None for window in parts.windows) or len(ids) != 1:
        raise IntaglioError("states are recorded of one row, in a model without sliding windows")
    installation = install(model, None, recording, [], range(len(parts.blocks)))
    try:
        cache = installation.new_cache(parts.config)
        parts.base(ids, **{CACHE: cache}, use_cache=True)
    finally:
        uninstall(model)
    states = []
    for layer, query in zip(cache.layers, recording._queries, strict=True):
        assert isinstance(layer, SparseLayer)
        (sequence,) = layer.sequences
        (buffer,) = sequence.buffers
        states.append((query, buffer.keys[:, : buffer.length], buffer.values[:, : buffer.length], sequence.scale))
    return PromptStates(tuple(states))
