"""Keeping the accepted path's rows of a key-value cache, and which caches that can be done with.

A pass over a tree leaves one row a node at the end of every layer's keys and values. The rows of the accepted path are
copied to the front of those, and the rest is cropped. Rows of different lengths in one batch stay aligned to the left:
row b uses the slots up to its own length, and what lies behind is a hole that no mask shows.

Two kinds of stock cache serve windowed layers: `DynamicCache()` keeps every row, and the masks carry the window;
`DynamicCache(config)` keeps the window's rows, and remembers what a crop may need back once recording is switched on
after the prefill.

Dimension letters: B rows, H heads, K slots, D width of a head, M rows moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from intaglio.errors import IntaglioError

ROOM = 256
"""Rows of room at the least."""


class RoomyLayer(DynamicLayer):
    """A layer's keys and values with room behind them, so that a pass writes its rows where they stay.

    The stock layer copies all that it holds at every pass: with 4,096 tokens of SmolLM2 that takes as long as a quarter
    of the pass. `keys` and `values` are the filled part, and may be replaced as with the stock layer; then the next
    pass makes room anew.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write rows behind those that are there.

        Args:
            key_states: [B, H, Q, D].
            value_states: likewise.
            *args: not used.
            **kwargs: not used.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room: dict[str, Tensor] = {}
        for name, states in (("keys", key_states), ("values", value_states)):
            held = getattr(self, name)
            before = held.shape[-2] if held.numel() else 0
            after = before + states.shape[-2]
            room = self._room.get(name)
            ours = room is not None and held.data_ptr() == room.data_ptr() and held.shape[:2] == room.shape[:2]
            if room is None or not ours or after > room.shape[-2]:
                shape = (*states.shape[:-2], after + max(ROOM, after // 4), states.shape[-1])
                room = self._room[name] = states.new_empty(shape)
                if before:
                    room[:, :, :before] = held
            room[:, :, before:after] = states
            setattr(self, name, room[:, :, :after])
        return self.keys, self.values


def roomy() -> DynamicCache:
    """An empty cache that keeps every row and has room for more."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = RoomyLayer
    return cache


def check_cache(cache: Any) -> None:
    """Refuse a cache whose rows cannot be put in another order.

    Args:
        cache: what `generate` would use.

    Raises:
        IntaglioError: no cache at all, or a static, quantized, offloaded, hybrid or encoder-decoder one.
    """
    if cache is None:
        raise IntaglioError("use_cache is False; speculative decoding keeps the accepted rows of a key-value cache")
    if not isinstance(cache, DynamicCache):
        raise IntaglioError(f"a {type(cache).__name__} was given; speculative decoding needs a DynamicCache")
    if cache.offloading:
        raise IntaglioError("the cache is offloaded; speculative decoding needs a DynamicCache that stays in memory")
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer):
            raise IntaglioError(
                f"the cache holds a {type(layer).__name__}; speculative decoding needs attention layers with dynamic "
                "keys and values"
            )


def is_windowed(cache: DynamicCache) -> bool:
    """Whether some layer of a cache drops the rows outside its window.

    Args:
        cache: a dynamic cache.
    """
    return any(cache.is_sliding)


def stop_recording(cache: DynamicCache) -> None:
    """Let a windowed cache drop rows as it goes again; other caches stay as they are.

    Args:
        cache: a dynamic cache, cropped.
    """
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.record_past = False


def drop_last(layers: Iterable[Any], count: int) -> None:
    """Drop the last slots of some layers, and nothing else.

    `crop` would also cut a windowed layer down to its window, and a later crop could not have the rows back.

    Args:
        layers: of a dynamic cache; recording, where they are windowed. Those that hold nothing stay so.
        count: slots, at least 0.
    """
    for layer in layers:
        if count and layer.is_initialized and layer.keys.numel():
            layer.keys, layer.values = layer.keys[:, :, :-count], layer.values[:, :, :-count]
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length -= count


def _filled(cache: DynamicCache) -> list[Any]:
    """The layers that hold rows; layers that share another's keys hold none."""
    return [layer for layer in cache.layers if layer.is_initialized and layer.keys.numel()]


def move_rows(cache: DynamicCache, source_BM: Tensor, target_BM: Tensor) -> None:
    """Copy rows within the last ones of every layer; sources are all read before any target is written.

    Args:
        cache: a dynamic cache.
        source_BM: where each row is, counted back from the end, int64 below 0.
        target_BM: where it goes, counted likewise.
    """
    rows, first = len(source_BM), int(target_BM[0, 0])
    straight = rows == 1  # one row: the targets are consecutive, so a plain slice takes them
    layers = _filled(cache)
    device = layers[0].keys.device
    source_BM, target_BM = source_BM.to(device), target_BM.to(device)
    for layer in layers:
        for held in (layer.keys, layer.values):
            slots = held.shape[-2]
            if straight:
                moved = held.index_select(2, source_BM[0] + slots)
                held[:, :, slots + first : slots + first + moved.shape[2]] = moved
                continue
            shape = (rows, held.shape[1], source_BM.shape[1], held.shape[3])
            moved = held.gather(2, (source_BM + slots)[:, None, :, None].expand(shape))
            held.scatter_(2, (target_BM + slots)[:, None, :, None].expand(shape), moved)


def moves(kept: Sequence[Sequence[int]], behind: Sequence[int], pending: int) -> tuple[Tensor, Tensor] | None:
    """Where the kept rows are and where they go, counted back from the end of the cache.

    Args:
        kept: for each row, which of its `pending` last slots stay, in their new order.
        behind: for each row, how many slots lie empty between its own rows and the pending ones.
        pending: slots that the last passes added.

    Returns:
        sources and targets [B, M], or None where every row stays where it is.
    """
    if all(not gap and list(slots) == list(range(len(slots))) for slots, gap in zip(kept, behind, strict=True)):
        return None
    most = max(map(len, kept))
    # A row that keeps fewer than another copies its last slot onto itself.
    source = torch.full((len(kept), most), -1)
    target = torch.full((len(kept), most), -1)
    for row, (slots, gap) in enumerate(zip(kept, behind, strict=True)):
        source[row, : len(slots)] = torch.tensor(slots, dtype=torch.long) - pending
        target[row, : len(slots)] = torch.arange(len(slots)) - pending - gap
    return source, target


def release(cache: DynamicCache) -> None:
    """Give every layer rows of its own, outside of inference mode, so that the user may do with them what they like.

    Args:
        cache: a dynamic cache filled under inference mode.
    """
    for layer in _filled(cache):
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
