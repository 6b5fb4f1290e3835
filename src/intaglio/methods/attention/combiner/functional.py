"""Pure tensor functions of Combiner: pooling, spans along an axis of a grid, and the joint softmax.

A sequence of L positions is a grid of R rows (segments) with C columns. Queries are scaled before all of this, since
pooling commutes with a positive factor; so both softmaxes are scaled exactly once.

Dimension letters: B batch rows, H query heads, L positions, R rows, C columns, D head size, N items of a query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pool = Literal["max", "mean", "sum"]
Axis = Literal["row", "column"]


class Part(NamedTuple):
    """Items of one kind in the joint softmax: scores [B, H, R, C, N] and the sum of their values by weights.

    `seen` and `sizes` broadcast to the scores: which items a query attends to, and how many tokens an item stands for.
    `dropout` is the rate of the weights.
    """

    scores: Tensor
    mix: Callable[[Tensor], Tensor]
    seen: Tensor
    sizes: Tensor | int = 1
    dropout: float = 0.0


class Span(NamedTuple):
    """Pooled queries, keys and values of spans [B, H, R, C, D], and their numbers of tokens [B or 1, 1, R, C]."""

    query: Tensor
    key: Tensor
    value: Tensor
    size: Tensor


def part(
    axis: Axis, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, sizes: Tensor | int = 1, dropout: float = 0.0
) -> Part:
    """Return the items along a query's own row or column.

    Args:
        axis: `row`: query (r, c) reads the keys (r, 1..N); `column`: the keys (1..N, c).
        query: [B, H, R, C, D].
        key: [B, H, R, N, D] along a row, [B, H, N, C, D] along a column, [B, H, N, D] where all queries share them.
        value: like the keys.
        seen: as in `Part`, like `sizes` and `dropout`.
    """
    if key.dim() == 4:
        grid = query.shape[2:4]
        scores = (query.flatten(2, 3) @ key.mT).unflatten(2, grid)
        return Part(scores, lambda w: (w.flatten(2, 3) @ value).unflatten(2, grid), seen, sizes, dropout)
    if axis == "row":
        return Part(query @ key.mT, lambda w: w @ value, seen, sizes, dropout)
    # Every column is a matrix of its own.
    scores = (query.transpose(2, 3) @ key.transpose(2, 3).mT).transpose(2, 3)
    return Part(scores, lambda w: (w.transpose(2, 3) @ value.transpose(2, 3)).transpose(2, 3), seen, sizes, dropout)


def softmax(scores: Tensor) -> Tensor:
    """Return the softmax over the last dimension, computed in float32 for half precision."""
    return scores.softmax(-1, dtype=_at_least_float32(scores.dtype)).to(scores.dtype)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def joint_attention(parts: Sequence[Part], size_bias: bool = False) -> Tensor:
    """Return Σ w v [B, H, R, C, D], with weights w from one softmax over the items of all parts.

    `size_bias` adds log |S| to the score of a span S.
    """
    scores = []
    for items in parts:
        values = items.scores
        if size_bias:
            sizes = torch.as_tensor(items.sizes, device=values.device).clamp(min=1)
            values = values + sizes.to(_at_least_float32(values.dtype)).log().to(values.dtype)
        scores.append(values.masked_fill(~items.seen, torch.finfo(values.dtype).min))
    weights = softmax(torch.cat(scores, -1))
    split = weights.split([values.shape[-1] for values in scores], -1)
    mixed = [
        items.mix(F.dropout(w, items.dropout) if items.dropout else w) for items, w in zip(parts, split, strict=True)
    ]
    return sum(mixed[1:], mixed[0])


def attend(items: Part) -> Tensor:
    """Return the values of one part by a softmax of its own."""
    return joint_attention([items])


def pooled(x: Tensor, dim: int, pool: Pool) -> Tensor:
    """Return x without `dim`."""
    return x.amax(dim) if pool == "max" else x.mean(dim) if pool == "mean" else x.sum(dim)


def merged(before: Tensor, x: Tensor, pool: Pool, count: Tensor | int = 1) -> Tensor:
    """Return the pool of x and of `count` earlier entries that are pooled in `before`."""
    if pool == "max":
        return torch.maximum(before, x)
    return before + x if pool == "sum" else (before * count + x) / (count + 1)


def exclusive_pool(x: Tensor, dim: int, pool: Pool, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pool of all entries before each along `dim` that are seen, 0 where there is none, and their number.

    Args:
        x: [B, H, R, C, D].
        dim: 2 or 3.
        pool: `max`, `mean` or `sum`.
        seen: entries that count, bool [B or 1, 1, R, C, 1].
    """
    counts = _shifted(seen.float().cumsum(dim), dim)
    if pool == "max":
        running = x.masked_fill(~seen, torch.finfo(x.dtype).min).cummax(dim).values
    else:
        running = x.masked_fill(~seen, 0.0).cumsum(dim)
    running = _shifted(running, dim)
    if pool == "mean":
        running = running / counts.clamp(min=1).to(x.dtype)
    return running.masked_fill(counts == 0, 0.0), counts


def _shifted(x: Tensor, dim: int) -> Tensor:
    """Return x moved on by one along `dim`, with zeros first."""
    return torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, x.shape[dim] - 1)], dim)


def running_span(
    pooled_query: Tensor,
    pooled_key: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    axis: Axis,
    pool: Pool,
    seen: Tensor,
    reverse: bool = False,
    dropout: float = 0.0,
) -> Span:
    """Return for each token the span of all tokens before it in its row or column.

        k_S = pool_{j in S} k_j,   q_S = pool_{j in S} q_j,   v_S = Σ_j softmax_j(q_S · k_j) v_j

    An empty span has the key 0, the size 0 and no meaning.

    Args:
        pooled_query: queries after the activation of the pooling, [B, H, R, C, D].
        pooled_key: keys, in the same way.
        key: keys, [B, H, R, C, D].
        value: values, [B, H, R, C, D].
        axis: direction of the spans.
        pool: `max`, `mean` or `sum`.
        seen: tokens that are not padding, bool [B or 1, 1, R, C, 1].
        reverse: take the tokens after it instead. Default False.
        dropout: rate of the weights of the values. Default 0.
    """
    dim = 2 if axis == "column" else 3
    if reverse:
        pooled_query, pooled_key, key, value, seen = (x.flip(dim) for x in (pooled_query, pooled_key, key, value, seen))
    queries, _ = exclusive_pool(pooled_query, dim, pool, seen)
    keys, counts = exclusive_pool(pooled_key, dim, pool, seen)
    before = torch.ones(key.shape[dim], key.shape[dim], dtype=torch.bool, device=key.device).tril(-1)
    # Scores along a row are [.., R, C, C], along a column [.., R, C, R].
    visible = before & seen.mT if axis == "row" else before[:, None] & seen[..., 0].mT[:, :, None]
    span = Span(queries, keys, attend(part(axis, queries, key, value, visible, dropout=dropout)), counts[..., 0])
    return Span(*(x.flip(dim) for x in span)) if reverse else span


def document_rows(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(places, real)`, [N, L'], that gather the tokens of documents [B, L] into rows of their own.

    `documents` are numbers from 0 in each batch row, -1 for padding. `places` count through all B · L positions. A
    batch row without packed documents stays one row, even if it holds padding only.
    """
    real = documents >= 0
    if documents.max() > 0:
        keys = documents + torch.arange(len(documents), device=documents.device)[:, None] * documents.shape[1]
        counts = keys[real].unique_consecutive(return_counts=True)[1]
    else:
        counts = real.sum(-1)
    order = torch.arange(max(1, int(counts.max())), device=documents.device)
    flat = F.pad(real.flatten().nonzero()[:, 0], (0, 1))
    places = (counts.cumsum(0) - counts)[:, None] + order
    return flat[places.clamp(max=len(flat) - 1)], order < counts[:, None]
