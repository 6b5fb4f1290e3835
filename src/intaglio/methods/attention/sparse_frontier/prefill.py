"""Prefill patterns: which keys each tile of consecutive queries reads, as indices.

A tile is `block_size` consecutive queries. A pattern selects keys for every head and tile; the attention over them is
causal within the tile (`tiled_attention`). So computed pairs are whole tiles of a key, as in the published kernels; a
`block_size` of 1 gives the pattern of single pairs.

Dimension letters: N tokens of a sequence, H query heads, G key-value heads, D width of a head, W last queries, T tiles,
K keys.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

Count = Annotated[int, Field(ge=1)]
EXACT = 1.0
"""Coverage at which FlexPrefill keeps every key, whatever the rounding of the sum."""


class FrozenSettings(BaseModel):
    """Base of the settings of a pattern or a cache policy."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


def check_budget(budget: int, sinks: int, recent: int) -> None:
    """Refuse a budget below the forced tokens."""
    if budget < sinks + recent:
        raise ValueError(
            f"budget is {budget}; at least the forced {sinks} sinks and {recent} recent tokens, {sinks + recent}, are "
            "accepted"
        )


class Indices(ABC):
    """The selected keys of one layer and sequence."""

    tile: int

    @abstractmethod
    def keys(self, head: int, first: int, last: int, limit: int) -> Tensor:
        """Return which of the first `limit` keys the tiles `first` to `last - 1` of a head read, bool [T, K]."""


@dataclass(frozen=True, eq=False)
class ColumnsAndOffsets(Indices):
    """Keys that every query reads, and distances i - j that are read on a whole tile: bool [H, N] each."""

    columns_HN: Tensor
    offsets_HN: Tensor
    tile: int

    def keys(self, head: int, first: int, last: int, limit: int) -> Tensor:
        """Return columns, and keys at a selected distance from some query of the tile."""
        columns_N, offsets_N = self.columns_HN[head], self.offsets_HN[head]
        length, device = len(offsets_N), offsets_N.device
        total = torch.nn.functional.pad(offsets_N.long().cumsum(0), (1, 0))
        # Distances from the tile's first query to each key; negative ones are keys inside the tile.
        distance_TK = torch.arange(first, last, device=device)[:, None] * self.tile - torch.arange(limit, device=device)
        near, far = distance_TK.clamp(0, length), (distance_TK + self.tile).clamp(0, length)
        return columns_N[:limit] | (total[far] > total[near])


@dataclass(frozen=True, eq=False)
class Blocks(Indices):
    """Blocks of keys of each tile, as wide as the tile: int64 [H, T, K], -1 for none."""

    blocks_HTK: Tensor
    tile: int

    def keys(self, head: int, first: int, last: int, limit: int) -> Tensor:
        """Return the keys of the tiles' blocks."""
        blocks_TK = self.blocks_HTK[head, first:last]
        count = -(-limit // self.tile)
        seen = torch.zeros((last - first, count + 1), dtype=torch.bool, device=blocks_TK.device)
        seen.scatter_(1, torch.where(blocks_TK < 0, count, blocks_TK).clamp(max=count), True)
        return seen[:, :count].repeat_interleave(self.tile, 1)[:, :limit]


@dataclass(frozen=True, eq=False)
class Best(Indices):
    """The keys with the highest scores of each query, so tiles of one query."""

    query_HND: Tensor
    key_GND: Tensor
    budget: int
    window: int | None
    tile: int = 1

    def keys(self, head: int, first: int, last: int, limit: int) -> Tensor:
        """Return the `budget` visible keys with the highest scores; all of fewer."""
        key_KD = self.key_GND[head // (len(self.query_HND) // len(self.key_GND)), :limit]
        scores_TK = (self.query_HND[head, first:last] @ key_KD.T).float()
        visible_TK = _visible(first, last, limit, self.window, scores_TK.device)
        best = scores_TK.masked_fill(~visible_TK, -torch.inf).topk(min(self.budget, limit)).indices
        return torch.zeros_like(visible_TK).scatter_(1, best, True) & visible_TK


def _visible(first: int, last: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return the causal mask of the queries `first` to `last - 1`, within a sliding window, bool [Q, K]."""
    distance = torch.arange(first, last, device=device)[:, None] - torch.arange(keys, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def last_weights(
    query_HND: Tensor, key_GND: Tensor, count: int, scale: float, window: int | None = None
) -> Iterator[Tensor]:
    """Yield for each key-value head the attention weights of the last `count` queries, float32 [H/G, W, N]."""
    length = key_GND.shape[1]
    visible_WN = _visible(length - count, length, length, window, key_GND.device)
    for group_gWD, key_ND in zip(query_HND[:, -count:].chunk(len(key_GND)), key_GND, strict=True):
        scores = (group_gWD @ key_ND.T).float() * scale
        yield scores.masked_fill(~visible_WN, -torch.inf).softmax(-1)


def diagonal_sums(weights_HWN: Tensor) -> Tensor:
    """Return the sums over the distances i - j of 0 to N - 1, [H, N], of weights of the last W queries."""
    heads, rows, length = weights_HWN.shape
    # With the keys reversed and W zeros to the right, distance o of row r lies at column o + W - 1 - r.
    padded = torch.nn.functional.pad(weights_HWN.flip(-1), (0, rows)).contiguous()
    width = length + rows
    return padded.as_strided((heads, rows, length), (rows * width, width - 1, 1), rows - 1).sum(1)


def _top(scores_HN: Tensor, count: int | Tensor, forced: int) -> Tensor:
    """Return the highest scores, `count` a head, as bool [H, N]; the first `forced` come before all others."""
    scores_HN = scores_HN.clone()
    scores_HN[:, :forced] = torch.inf
    order_HN = scores_HN.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores_HN.shape[1], device=scores_HN.device).expand_as(order_HN)
    limit = count[:, None] if isinstance(count, Tensor) else count
    return torch.zeros_like(scores_HN, dtype=torch.bool).scatter_(1, order_HN, rank < limit)


class _Tiled(FrozenSettings):
    """Patterns of columns and offsets.

    Args:
        sinks: first tokens that every query reads. Default 4.
        block_size: queries of a tile. Default 64.
    """

    sinks: Annotated[int, Field(ge=0)] = 4
    block_size: Count = 64

    def indices(self, query_HND: Tensor, key_GND: Tensor, scale: float, window: int | None, layer: int) -> Indices:
        """Select the keys of one sequence from its queries and keys, both after rotary embedding."""
        raise NotImplementedError


class VerticalSlash(_Tiled):
    """MInference's vertical-slash: columns c and offsets o with the most attention of the last queries.

        c_j = sum_i S[i, j],  c_o = sum_i S[i, i - o],  S = softmax(q_last k^T / sqrt D)

    Args:
        recent: nearest tokens that every query reads, itself included. Default 64.
        num_queries: last queries that the scores are estimated from. Default 256.
        columns: columns kept. Default 512.
        offsets: offsets kept. Default 512.
    """

    name: Literal["vertical_slash"] = "vertical_slash"
    recent: Count = 64
    num_queries: Count = 256
    columns: Count = 512
    offsets: Count = 512

    @model_validator(mode="after")
    def _holds_the_forced(self) -> Self:
        if self.columns < self.sinks or self.offsets < self.recent:
            raise ValueError(
                f"columns is {self.columns} and offsets {self.offsets}; at least the forced {self.sinks} sinks and "
                f"{self.recent} recent tokens are accepted"
            )
        return self

    def indices(self, query_HND: Tensor, key_GND: Tensor, scale: float, window: int | None, layer: int) -> Indices:
        """Keep the columns and offsets with the highest sums."""
        count = min(self.num_queries, key_GND.shape[1])
        columns_HN, offsets_HN = _sums(query_HND, key_GND, count, scale, window)
        return ColumnsAndOffsets(
            _top(columns_HN, self.columns, self.sinks), _top(offsets_HN, self.offsets, self.recent), self.block_size
        )


def _sums(query_HND: Tensor, key_GND: Tensor, count: int, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """Return the sums of the last queries' weights by column and by offset, float32 [H, N] each."""
    sums = [(w.sum(1), diagonal_sums(w)) for w in last_weights(query_HND, key_GND, count, scale, window)]
    return torch.cat([columns for columns, _ in sums]), torch.cat([offsets for _, offsets in sums])


class FlexPrefill(_Tiled):
    """FlexPrefill as in the study: vertical-slash whose budget covers a share of the attention.

    A head keeps #{cumulative sums of the sorted scores <= coverage} + 1 columns, and as many offsets by their scores,
    but at least `min_budget`. The original's query-aware block pattern is not part of the study.

    Args:
        recent: nearest tokens that every query reads, itself included. Default 64.
        coverage: share of the attention, above 0; 1 keeps everything. Default 0.65; "alpha" in the paper.
        min_budget: fewest columns and fewest offsets. Default 512.
        num_queries: last queries that the scores are estimated from. Default 512.
    """

    name: Literal["flex_prefill"] = "flex_prefill"
    recent: Count = 64
    coverage: Annotated[float, Field(gt=0, le=1)] = 0.65
    min_budget: Count = 512
    num_queries: Count = 512

    @model_validator(mode="after")
    def _holds_the_forced(self) -> Self:
        if self.min_budget < max(self.sinks, self.recent):
            raise ValueError(
                f"min_budget is {self.min_budget}; at least the forced {self.sinks} sinks and {self.recent} recent "
                "tokens are accepted"
            )
        return self

    def counts(self, scores_HN: Tensor) -> Tensor:
        """Return the number of kept columns or offsets of each head, int64 [H]."""
        if self.coverage == EXACT:
            return torch.full((len(scores_HN),), scores_HN.shape[1], device=scores_HN.device)
        covered = scores_HN.sort(dim=-1, descending=True).values.cumsum(-1) <= self.coverage
        return (covered.sum(-1) + 1).clamp(min=self.min_budget)

    def indices(self, query_HND: Tensor, key_GND: Tensor, scale: float, window: int | None, layer: int) -> Indices:
        """Keep columns and offsets that cover the share."""
        count = min(self.num_queries, key_GND.shape[1])
        columns_HN, offsets_HN = (total / count for total in _sums(query_HND, key_GND, count, scale, window))
        return ColumnsAndOffsets(
            _top(columns_HN, self.counts(columns_HN), self.sinks),
            _top(offsets_HN, self.counts(offsets_HN), self.recent),
            self.block_size,
        )


class BlockSparse(FrozenSettings):
    """MInference's block-sparse: the key blocks whose mean key has the highest score with the tile's mean query.

    Block 0, the diagonal block and the one before it are always kept. The last block's mean counts missing tokens as
    zeros.

    Args:
        block_size: tokens of a block. Default 16.
        blocks: key blocks of each query block, at least 3. Default 64.
    """

    name: Literal["block_sparse"] = "block_sparse"
    block_size: Count = 16
    blocks: Annotated[int, Field(ge=3)] = 64

    def indices(self, query_HND: Tensor, key_GND: Tensor, scale: float, window: int | None, layer: int) -> Indices:
        """Keep the blocks with the highest scores."""
        query_HTD, key_GTD = block_means(query_HND, self.block_size), block_means(key_GND, self.block_size)
        key_HTD = key_GTD.repeat_interleave(len(query_HTD) // len(key_GTD), 0)
        scores_HTT = (query_HTD @ key_HTD.mT).float()
        tiles = scores_HTT.shape[-1]
        block_T = torch.arange(tiles, device=scores_HTT.device)
        blocks_apart_TT = block_T[:, None] - block_T  # blocks between a query block and a key block
        scores_HTT.masked_fill_((blocks_apart_TT <= 1) | (block_T == 0), torch.inf)
        hidden_TT = blocks_apart_TT < 0
        if window is not None:
            # The nearest two tokens of the blocks are this far apart.
            hidden_TT = hidden_TT | ((blocks_apart_TT - 1) * self.block_size + 1 >= window)
        scores_HTT.masked_fill_(hidden_TT, -torch.inf)
        best = scores_HTT.topk(min(self.blocks, tiles))
        return Blocks(torch.where(best.values == -torch.inf, -1, best.indices), self.block_size)

    @staticmethod
    def sparsity(length: int, block_size: int, blocks: int) -> float:
        """Return the share of causal block pairs that are left out: 1 - [K(K+1)/2 + (T-K)K] / [T(T+1)/2]."""
        tiles = -(-length // block_size)
        kept = min(blocks, tiles)
        return 1 - (kept * (kept + 1) / 2 + (tiles - kept) * kept) / (tiles * (tiles + 1) / 2)

    @classmethod
    def at_sparsity(cls, length: int, sparsity: float, block_size: int = 16) -> Self:
        """Return the pattern whose closed form is nearest to a sparsity."""
        counts = range(3, max(-(-length // block_size), 3) + 1)
        best = min(counts, key=lambda blocks: abs(cls.sparsity(length, block_size, blocks) - sparsity))
        return cls(block_size=block_size, blocks=best)


def block_means(states_HND: Tensor, size: int) -> Tensor:
    """Return the means of blocks of `size` tokens, the last one filled with zeros, [H, T, D]."""
    heads, length, width = states_HND.shape
    padded = torch.nn.functional.pad(states_HND, (0, 0, 0, -length % size))
    return padded.view(heads, -1, size, width).mean(2)


class SinkWindow(_Tiled):
    """Baseline: the first tokens and the most recent ones, whatever the input.

    Args:
        budget: tokens that a query reads, at least `sinks + 1`. Default 1024.
    """

    name: Literal["sink_window"] = "sink_window"
    budget: Count = 1024

    @model_validator(mode="after")
    def _holds_the_forced(self) -> Self:
        check_budget(self.budget, self.sinks, 1)
        return self

    def indices(self, query_HND: Tensor, key_GND: Tensor, scale: float, window: int | None, layer: int) -> Indices:
        """Keep the first and the nearest keys."""
        fixed_HN = query_HND.new_zeros(query_HND.shape[:2])
        columns_HN = _top(fixed_HN, self.sinks, self.sinks)
        return ColumnsAndOffsets(columns_HN, _top(fixed_HN, self.budget - self.sinks, 1), self.block_size)


class Random(_Tiled):
    """Baseline: columns drawn at random for each head and layer, besides the forced tokens.

    Args:
        recent: nearest tokens that every query reads, itself included. Default 64.
        budget: columns and recent tokens together, at least the forced ones. Default 1024.
        seed: of the draw. Default 0.
    """

    name: Literal["random"] = "random"
    recent: Count = 64
    budget: Count = 1024
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _holds_the_forced(self) -> Self:
        check_budget(self.budget, self.sinks, self.recent)
        return self

    def indices(self, query_HND: Tensor, key_GND: Tensor, scale: float, window: int | None, layer: int) -> Indices:
        """Keep random columns."""
        heads, length, _ = query_HND.shape
        scores_HN = draws(self.seed, layer, heads, length).to(query_HND.device)
        columns_HN = _top(scores_HN, self.budget - self.recent, self.sinks)
        return ColumnsAndOffsets(columns_HN, _top(torch.zeros_like(scores_HN), self.recent, 1), self.block_size)


def draws(seed: int, layer: int, heads: int, length: int) -> Tensor:
    """Return uniform numbers [H, N] that follow from the seed, the layer and the length."""
    digest = hashlib.sha256(f"{seed}:{layer}:{length}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
    return torch.rand((heads, length), generator=generator)


class Oracle(FrozenSettings):
    """Baseline: the keys with the highest scores of every single query, which takes all scores to know.

    Args:
        budget: keys of a query. Default 1024.
    """

    name: Literal["oracle"] = "oracle"
    budget: Count = 1024

    def indices(self, query_HND: Tensor, key_GND: Tensor, scale: float, window: int | None, layer: int) -> Indices:
        """Keep the best keys of each query."""
        return Best(query_HND, key_GND, self.budget, window)


Prefill = VerticalSlash | BlockSparse | FlexPrefill | SinkWindow | Random | Oracle
