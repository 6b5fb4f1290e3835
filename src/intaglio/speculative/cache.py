"""Row operations on a KV cache: keep the accepted path's rows, and refuse caches where that is impossible.

A pass over a tree leaves one row per node at the end of every layer's keys and values. The rows of the accepted path
are copied to the front of those, and the rest is cropped. Rows of different lengths in one batch stay left-aligned: row
b uses the slots up to its own length, and the slots after it are a hole that no mask shows.

Two kinds of stock cache serve windowed layers: `DynamicCache()` keeps every row, and the masks carry the window;
`DynamicCache(config)` keeps the window's rows, and keeps the rows that a crop may need back once recording is switched
on after the prefill.

Dimension letters: B rows, H heads, K slots, D width of a head, M rows moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from intaglio.errors import IntaglioError

# Layers that read the keys and values of another one, which a version before 5.24 does not list.
_SHARING = getattr(cache_utils, "DummyLayer", DynamicLayer)

ROOM = 256
"""Fewest spare rows."""


class PreallocatedLayer(DynamicLayer):
    """Keys and values of a layer in preallocated memory, so that a pass writes its rows in place.

    The stock layer copies all its content at every pass: with 4,096 tokens of SmolLM2 that takes a quarter of the pass.
    `keys` and `values` are the filled part, and may be replaced as with the stock layer; then the next pass allocates
    again.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append rows [B, H, Q, D]; other arguments are ignored."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers: dict[str, Tensor] = {}
        for name, states in (("keys", key_states), ("values", value_states)):
            held = getattr(self, name)
            before = held.shape[-2] if held.numel() else 0
            after = before + states.shape[-2]
            buffer = self._buffers.get(name)
            ours = buffer is not None and held.data_ptr() == buffer.data_ptr() and held.shape[:2] == buffer.shape[:2]
            if buffer is None or not ours or after > buffer.shape[-2]:
                shape = (*states.shape[:-2], after + max(ROOM, after // 4), states.shape[-1])
                buffer = self._buffers[name] = states.new_empty(shape)
                if before:
                    buffer[:, :, :before] = held
            buffer[:, :, before:after] = states
            setattr(self, name, buffer[:, :, :after])
        return self.keys, self.values


def preallocated_cache() -> DynamicCache:
    """Return an empty cache that keeps every row, in preallocated memory."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = PreallocatedLayer
    return cache


TREE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, PreallocatedLayer, _SHARING)
"""Kinds of cache layers whose rows can be reordered."""


def other_layer(cache: DynamicCache) -> str | None:
    """Return the class of the first layer whose rows cannot be reordered, or None."""
    return next((type(layer).__name__ for layer in cache.layers if type(layer) not in TREE_LAYERS), None)


def check_cache(cache: Any) -> None:
    """Raise an `IntaglioError` for no cache at all, and for static, quantized, offloaded and encoder-decoder caches."""
    if cache is None:
        raise IntaglioError(
            "generate made no key-value cache (use_cache is False, or the model keeps a state of another kind); "
            "speculative decoding keeps the accepted rows of one"
        )
    if not isinstance(cache, DynamicCache):
        raise IntaglioError(f"a {type(cache).__name__} was given; speculative decoding needs a DynamicCache")
    if cache.offloading:
        raise IntaglioError("the cache is offloaded; speculative decoding needs a DynamicCache that stays in memory")


def is_windowed(cache: DynamicCache) -> bool:
    """Return whether some layer of a cache drops the rows outside its window."""
    return any(cache.is_sliding)


def stop_recording(cache: DynamicCache) -> None:
    """Let a cropped windowed cache drop rows again; other caches stay unchanged."""
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.record_past = False


def drop_last(layers: Iterable[Any], count: int) -> None:
    """Drop the last `count` slots of some layers of a dynamic cache (recording, if they are windowed).

    `crop` would also cut a windowed layer down to its window, and a later crop could not have the rows back.
    """
    for layer in layers:
        if count and layer.is_initialized and layer.keys is not None and layer.keys.numel():
            layer.keys, layer.values = layer.keys[:, :, :-count], layer.values[:, :, :-count]
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length -= count


def _filled(cache: DynamicCache) -> list[Any]:
    """Return the layers that hold rows; layers that share another's keys hold none."""
    filled = [x for x in cache.layers if isinstance(x, DynamicLayer) and x.is_initialized and x.keys is not None]
    return [layer for layer in filled if layer.keys.numel()]


def move_rows(cache: DynamicCache, source_BM: Tensor, target_BM: Tensor) -> None:
    """Copy rows within the last ones of every layer; all sources are read before any target is written.

    Indices are counted back from the end (int64 below 0).
    """
    rows, first = len(source_BM), int(target_BM[0, 0])
    consecutive = rows == 1  # so the targets are a plain slice
    layers = _filled(cache)
    device = layers[0].keys.device
    source_BM, target_BM = source_BM.to(device), target_BM.to(device)
    for layer in layers:
        for held in (layer.keys, layer.values):
            slots = held.shape[-2]
            if consecutive:
                moved = held.index_select(2, source_BM[0] + slots)
                held[:, :, slots + first : slots + first + moved.shape[2]] = moved
                continue
            shape = (rows, held.shape[1], source_BM.shape[1], held.shape[3])
            moved = held.gather(2, (source_BM + slots)[:, None, :, None].expand(shape))
            held.scatter_(2, (target_BM + slots)[:, None, :, None].expand(shape), moved)


def row_moves(kept: Sequence[Sequence[int]], gaps: Sequence[int], pending: int) -> tuple[Tensor, Tensor] | None:
    """Return sources and targets [B, M] for `move_rows`; None if every row stays where it is.

    Args:
        kept: for each row, which of its `pending` last slots stay, in their new order.
        gaps: for each row, the empty slots between its own rows and the pending ones.
        pending: slots that the last passes added.
    """
    if all(not gap and list(slots) == list(range(len(slots))) for slots, gap in zip(kept, gaps, strict=True)):
        return None
    most = max(map(len, kept))
    # A row that keeps fewer than another copies its last slot onto itself.
    source = torch.full((len(kept), most), -1)
    target = torch.full((len(kept), most), -1)
    for row, (slots, gap) in enumerate(zip(kept, gaps, strict=True)):
        source[row, : len(slots)] = torch.tensor(slots, dtype=torch.long) - pending
        target[row, : len(slots)] = torch.arange(len(slots)) - pending - gap
    return source, target


def release(cache: DynamicCache) -> None:
    """Copy the rows of a cache filled under inference mode, so that users may compute with them."""
    for layer in _filled(cache):
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    for layer in cache.layers:
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            states.update({index: state.clone() for index, state in states.items() if state is not None})
