"""Attention over the keys that a prefill pattern selects, and the count of computed pairs.

On a CPU each tile gathers its keys and calls SDPA; no mask of queries by keys is made. On a GPU the indices become a
`BlockMask` of FlexAttention. That path is tested on a CPU only: it has not been run on a GPU.

Dimension letters: N tokens of a sequence, H query heads, G key-value heads, D width of a head, B queries of a tile, T
tiles, K keys, S blocks of FlexAttention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from intaglio.methods.attention.sparse_frontier.prefill import Indices

ELEMENTS = 1 << 18
"""Limit of tiles times keys that are gathered at a time."""
FLEX_BLOCK = 128


@dataclass
class Meter:
    """Counts of query-key pairs: computed ones and those of dense attention, of the prompt and of decoding."""

    prefill_computed: float = 0
    prefill_pairs: float = 0
    decode_computed: float = 0
    decode_pairs: float = 0

    @property
    def prefill_sparsity(self) -> float:
        """Share of the prompt's causal pairs that were not computed; 0 of nothing."""
        return 1 - self.prefill_computed / self.prefill_pairs if self.prefill_pairs else 0.0

    @property
    def decode_sparsity(self) -> float:
        """Share of the decoded tokens' pairs that were not computed; 0 of nothing."""
        return 1 - self.decode_computed / self.decode_pairs if self.decode_pairs else 0.0


def causal_pairs(length: int, window: int | None) -> int:
    """Return the number of causal pairs of a sequence within a window."""
    inside = length if window is None else min(window, length)
    return inside * (inside + 1) // 2 + (length - inside) * inside


def tiled_attention(
    query_HND: Tensor,
    key_GND: Tensor,
    value_GND: Tensor,
    indices: Indices,
    scale: float,
    window: int | None = None,
    meter: Meter | None = None,
) -> Tensor:
    """Return softmax attention over the selected keys, [H, N, D].

    Args:
        query_HND: queries of one sequence without padding.
        key_GND: its keys; H is a multiple of G.
        value_GND: its values.
        indices: the selected keys; the tile of a query holds at least the query's own key.
        scale: factor of the scores.
        window: sliding window in tokens; None for none.
        meter: adds the computed pairs.
    """
    heads, length, width = query_HND.shape
    if query_HND.device.type == "cuda":
        return flex_tiles(query_HND, key_GND, value_GND, indices, scale, window, meter)
    size, tiles = indices.tile, -(-length // indices.tile)
    query_HTBD = torch.nn.functional.pad(query_HND, (0, 0, 0, tiles * size - length)).view(heads, tiles, size, width)
    out_HTBD = query_HND.new_empty((heads, tiles, size, value_GND.shape[-1]))
    for head in range(heads):
        group = head // (heads // len(key_GND))
        for first, last in _chunks(length, size):
            index_TK, seen_TBK = gather_indices(indices, head, first, last, length, window)
            if meter is not None:
                meter.prefill_computed += _pairs(index_TK, first * size, size, length, window)
            index_TK = index_TK.clamp(max=length - 1)
            # A head of one in the second dimension, for the fused kernel.
            attended = torch.nn.functional.scaled_dot_product_attention(
                query_HTBD[head, first:last, None],
                key_GND[group][index_TK][:, None],
                value_GND[group][index_TK][:, None],
                seen_TBK[:, None],
                scale=scale,
            )
            out_HTBD[head, first:last] = attended[:, 0]
    if meter is not None:
        meter.prefill_pairs += heads * causal_pairs(length, window)
    return out_HTBD.view(heads, tiles * size, -1)[:, :length]


def _chunks(length: int, size: int) -> list[tuple[int, int]]:
    """Return ranges of tiles whose keys are gathered together."""
    tiles = -(-length // size)
    step = max(1, ELEMENTS // length)
    return [(first, min(first + step, tiles)) for first in range(0, tiles, step)]


def gather_indices(
    indices: Indices, head: int, first: int, last: int, length: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return the keys of some tiles, int64 [T, K] filled up with N, and which query sees them, bool [T, B, K]."""
    size = indices.tile
    seen_TK = indices.keys(head, first, last, min(last * size, length))
    counts_T = seen_TK.sum(-1)
    tile, key = seen_TK.nonzero(as_tuple=True)
    place = torch.arange(len(tile), device=tile.device) - (counts_T.cumsum(0) - counts_T)[tile]
    index_TK = torch.full((last - first, int(counts_T.max())), length, device=tile.device)
    index_TK[tile, place] = key
    # Rows after the last token see what that token sees.
    query_T = torch.arange(first * size, last * size, dtype=torch.int32, device=tile.device).clamp(max=length - 1)
    distance_TBK = query_T.view(-1, size, 1) - index_TK[:, None].int()
    visible_TBK = distance_TBK >= 0
    return index_TK, visible_TBK if window is None else visible_TBK & (distance_TBK < window)


def _pairs(index_TK: Tensor, start: int, size: int, length: int, window: int | None) -> int:
    """Return how many pairs the tiles from the query `start` on compute with their keys; key N is none."""
    first_T1 = start + size * torch.arange(len(index_TK), device=index_TK.device)[:, None]
    last_TK = (first_T1 + size - 1).clamp(max=length - 1).expand_as(index_TK)
    if window is not None:
        last_TK = torch.minimum(last_TK, index_TK + window - 1)
    return int((last_TK - torch.maximum(first_T1, index_TK) + 1).clamp(min=0).sum())


def kept_pairs(indices: Indices, heads: int, length: int, window: int | None) -> Tensor:
    """Return which pairs a pattern computes, bool [H, N, N], for pictures and tests of short sequences."""
    pairs = torch.zeros((heads, length, length + 1), dtype=torch.bool)
    size = indices.tile
    for head in range(heads):
        for first, last in _chunks(length, size):
            index_TK, seen_TBK = gather_indices(indices, head, first, last, length, window)
            rows = range(first * size, min(last * size, length))
            index_QK = index_TK.repeat_interleave(size, 0)[: len(rows)]
            seen_QK = seen_TBK.reshape(-1, seen_TBK.shape[-1])[: len(rows)]
            pairs[head, rows.start : rows.stop].scatter_(1, torch.where(seen_QK, index_QK, length), True)
    return pairs[..., :length]


def block_mask(indices: Indices, heads: int, length: int, window: int | None) -> BlockMask:
    """Return FlexAttention's block mask of a pattern, made from the selected keys without a pass over all pairs.

    Its cost is a table of tiles by keys a head, which also serves as the mask within a block.
    """
    size, tiles, blocks = indices.tile, -(-length // indices.tile), -(-length // FLEX_BLOCK)
    table_HTK = torch.stack([indices.keys(head, 0, tiles, length) for head in range(heads)])
    table_HTK = torch.nn.functional.pad(table_HTK, (0, blocks * FLEX_BLOCK - length))
    count_HTS = table_HTK.view(heads, tiles, blocks, FLEX_BLOCK).any(-1).long().cumsum(1)
    block_S = torch.arange(blocks, device=table_HTK.device)
    first_S, last_S = block_S * FLEX_BLOCK // size, ((block_S + 1) * FLEX_BLOCK - 1) // size
    total_HTS = torch.nn.functional.pad(count_HTS, (0, 0, 1, 0))
    used_HSS = total_HTS[:, (last_S + 1).clamp(max=tiles)] > total_HTS[:, first_S]
    used_HSS &= block_S[:, None] >= block_S

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen = table_HTK[h, (q // size).clamp(max=tiles - 1), kv] & (kv <= q)
        return seen if window is None else seen & (q - kv < window)

    order_HSS = used_HSS.int().argsort(dim=-1, descending=True, stable=True).int()
    number_HS = used_HSS.sum(-1, dtype=torch.int32)
    return BlockMask.from_kv_blocks(
        number_HS[None], order_HSS[None], BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod, seq_lengths=(length, length)
    )


def flex_tiles(
    query_HND: Tensor,
    key_GND: Tensor,
    value_GND: Tensor,
    indices: Indices,
    scale: float,
    window: int | None = None,
    meter: Meter | None = None,
) -> Tensor:
    """Return the same as `tiled_attention` by FlexAttention; the meter counts whole blocks."""
    heads, length, _ = query_HND.shape
    mask = block_mask(indices, heads, length, window)
    if meter is not None:
        pairs = heads * causal_pairs(length, window)
        meter.prefill_computed += min(int(mask.kv_num_blocks.sum()) * FLEX_BLOCK**2, pairs)
        meter.prefill_pairs += pairs
    flex = torch.compile(flex_attention) if query_HND.device.type == "cuda" else flex_attention
    out: Tensor = flex(query_HND[None], key_GND[None], value_GND[None], block_mask=mask, scale=scale, enable_gqa=True)
    return out[0]
