"""The variants on a grid of rows (segments) and columns: fixed, axial row-major, and both axial mixtures.

A variant has two forms that share their spans. `parallel` returns the output of all tokens. `step` returns that of one
new token in each batch row, at a row and column of its own, from what `GridState` keeps of the tokens before it, and
adds the spans of a row that it completes.

Dimension letters: B batch rows, n batch rows whose grid row is complete, H query heads, R rows, C columns, D head size,
W width of the hidden state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.methods.attention.combiner.functional import (
    Axis,
    Part,
    Pool,
    Span,
    attend,
    joint_attention,
    merged,
    part,
    pooled,
    running_span,
)

Tensors = dict[str, Tensor]
RowSummary = Literal["proj", "wsum", "wsum_proj", "none"]
Activate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Returns queries and keys after the activation of the pooling."""
Project = Callable[[Tensor, Tensor, float], Tensor]
"""Returns the keys of row summaries [B, H, R, C, D] from summaries, hidden states [B, R, C, W] and a dropout rate."""


@dataclass(frozen=True)
class Tokens:
    """Queries (scaled), keys, values and hidden states of tokens, on a grid or as a sequence.

    Args:
        query: [B, H, R, C, D], or [B, H, L, D] as a sequence.
        key: like the queries; key heads repeated.
        value: like the keys.
        hidden: inputs of the attention layer, [B, R, C, W] or [B, L, W]; None where nothing reads them.
        pooled_query: queries after the activation of the pooling.
        pooled_key: keys after the activation of the pooling.
        real: tokens that are not padding, bool [B or 1, 1, R, C, 1] or [B or 1, L].
        groups: query heads of a key head.
        dropout: rate of the attention weights.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor | None
    pooled_query: Tensor
    pooled_key: Tensor
    real: Tensor
    groups: int = 1
    dropout: float = 0.0

    def on_grid(self, columns: int, rows: int) -> Tokens:
        """Return the sequence as a grid, with zeros after its end."""
        missing = rows * columns - self.query.shape[2]

        def grid(x: Tensor) -> Tensor:
            return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(-2, (rows, columns))

        names = ("query", "key", "value", "pooled_query", "pooled_key")
        on_grid: Tensors = {name: grid(getattr(self, name)) for name in names}
        hidden = None if self.hidden is None else grid(self.hidden)
        return replace(self, **on_grid, hidden=hidden, real=grid(self.real[:, None, :, None]))  # type: ignore[arg-type]


@dataclass
class GridState:
    """State of earlier tokens during generation.

    Args:
        length: tokens of each batch row, int64 [B].
        row: queries, keys, values and hidden states of the unfinished grid row, [B, H, C, D] or [B, C, W].
        spans: of finished grid rows, [B, H, R, ...] with room at the end.
        running: pools over all finished grid rows, [B, H, C, D].
    """

    length: Tensor
    row: Tensors
    spans: Tensors
    running: Tensors


ROOM = 16
"""Grid rows by which a state grows."""


def _below(count: int, device: torch.device, diagonal: int = -1) -> Tensor:
    """Return the lower triangle, bool [count, count]."""
    return torch.ones(count, count, dtype=torch.bool, device=device).tril(diagonal)


def _at_column(x: Tensor, column: Tensor) -> Tensor:
    """Return [B, H, R, D] at each batch row's column from [B, H, R, C, D]."""
    return x[torch.arange(len(x), device=x.device), :, :, column]


class Fixed:
    """Own segment up to the query, and every earlier segment as a span.

    k_S = pool_{j in S} k_j,   q_S = pool_{j in S} q_j,   v_S = Σ_j softmax_j(q_S · k_j) v_j
    """

    def __init__(self, columns: int, pool: Pool, size_bias: bool) -> None:
        self.columns, self.pool, self.size_bias = columns, pool, size_bias

    def spans(self, x: Tokens) -> tuple[Tensors, Tensors]:
        """Return the spans of each grid row, and what is pooled over all earlier ones."""
        query = pooled(x.pooled_query, 3, self.pool)[:, :, :, None]
        everything = torch.ones((), dtype=torch.bool, device=query.device)
        value = attend(part("row", query, x.key, x.value, everything, dropout=x.dropout))
        return {"key": pooled(x.pooled_key, 3, self.pool), "value": value[:, :, :, 0]}, {}

    def parts(self, x: Tokens, spans: Tensors, running: Tensors) -> list[Part]:
        """Return the items of all tokens of a grid."""
        local, earlier = _below(self.columns, x.query.device, 0), _below(x.query.shape[2], x.query.device)[:, None]
        return [
            part("row", x.query, x.key, x.value, local, dropout=x.dropout),
            part("column", x.query, spans["key"], spans["value"], earlier, self.columns),
        ]

    def step_parts(self, query: Tensor, state: GridState, column: Tensor, row: Tensor) -> list[Part]:
        """Return the items, besides the unfinished grid row, of one new token [B, H, 1, 1, D] in each batch row."""
        earlier = self._earlier(state, row)
        return [part("column", query, state.spans["key"], state.spans["value"], earlier, self.columns)]

    @staticmethod
    def _earlier(state: GridState, row: Tensor) -> Tensor:
        count = next(iter(state.spans.values())).shape[2]
        return (torch.arange(count, device=row.device) < row[:, None])[:, None, None, None]

    def running_after(self, x: Tokens, state: GridState, row: Tensor, done: Tensor) -> Tensors:
        """Return what is pooled over all grid rows after one more, `x`, is complete; the spans are stored already."""
        return {}

    def parallel(self, x: Tokens, keep: bool = False) -> tuple[Tensor, GridState | None]:
        """Return the outputs [B, H, L, D] of a sequence, and with `keep` the state after it."""
        length, columns = x.query.shape[2], self.columns
        # With room for the next token, whose grid row may be a new one.
        grid = x.on_grid(columns, length // columns + 1 if keep else -(-length // columns))
        spans, running = self.spans(grid)
        output = joint_attention(self.parts(grid, spans, running), self.size_bias).flatten(2, 3)[:, :, :length]
        if not keep:
            return output, None
        count = x.real.sum(-1).expand(len(x.query))
        batch, row = torch.arange(len(count), device=count.device), count // columns
        own = {name: getattr(grid, name)[batch, :, row] for name in ("query", "key", "value")}
        if grid.hidden is not None:
            own["hidden"] = grid.hidden[batch, row]
        running = {name: value[batch, :, row] for name, value in running.items()}
        kept = ({name: value.detach().clone() for name, value in known.items()} for known in (own, spans, running))
        return output, GridState(count.clone(), *kept)

    def step(self, x: Tokens, state: GridState, activate: Activate) -> Tensor:
        """Return the outputs [B, H, 1, D] of one token in each batch row, and add the real ones to the state.

        Args:
            x: one token, [B, H, 1, D]; those that are padding change nothing.
            state: changed in place.
            activate: the activation of the pooling, for the tokens of a row that is complete.
        """
        row, column = state.length // self.columns, state.length % self.columns
        real = x.real.expand(len(row), 1)[:, 0]
        alive = real.nonzero()[:, 0]
        for name, buffer in state.row.items():
            new = getattr(x, name)[..., 0, :]
            index = (alive, column[alive]) if name == "hidden" else (alive, slice(None), column[alive])
            buffer[index] = new[alive]
        query = x.query[:, :, None]
        local = (torch.arange(self.columns, device=row.device) <= column[:, None])[:, None, None, None]
        own = part("row", query, state.row["key"][:, :, None], state.row["value"][:, :, None], local)
        output = joint_attention([own, *self.step_parts(query, state, column, row)], self.size_bias)
        state.length += real
        done = (real & (column == self.columns - 1)).nonzero()[:, 0]
        if len(done):
            self._finish(x, state, row, done, activate)
        return output[:, :, 0]

    def _finish(self, x: Tokens, state: GridState, row: Tensor, done: Tensor, activate: Activate) -> None:
        """Add the spans of the grid rows that are complete, those of the batch rows `done`."""
        query, key, value = (state.row[name][done][:, :, None] for name in ("query", "key", "value"))
        hidden = state.row["hidden"][done][:, None] if "hidden" in state.row else None
        real = torch.ones(1, 1, 1, self.columns, 1, dtype=torch.bool, device=key.device)
        grid = Tokens(query, key, value, hidden, *activate(query, key), real, x.groups)
        spans, _ = self.spans(grid)
        for name, new in spans.items():
            kept = state.spans[name]
            if int(row[done].max()) >= kept.shape[2]:
                room = kept.new_zeros(*kept.shape[:2], ROOM, *kept.shape[3:])
                state.spans[name] = kept = torch.cat([kept, room], 2)
            kept[done, :, row[done]] = new[:, :, 0]
        for name, new in self.running_after(grid, state, row, done).items():
            state.running[name][done] = new


class RowMajor(Fixed):
    """Own row up to the query, and every earlier row as seen through the query's column.

        y_rc = Σ_t softmax_t(q_rc · k_rt) v_rt,   k^_rc = W2 LN(x_rc + Dropout(W1 y_rc))

    The softmax is over the whole row: only later rows read it.

    Args:
        columns: C.
        size_bias: whether log C is added to the scores of spans.
        summary: `proj`, as above; `wsum`, Σ_t softmax_t k_rt instead of k^; `wsum_proj`, k^ of that sum; `none`, k_rc.
        project: the learned part.
    """

    def __init__(self, columns: int, size_bias: bool, summary: RowSummary, project: Project) -> None:
        super().__init__(columns, "max", size_bias)
        self.summary, self.project = summary, project

    def spans(self, x: Tokens) -> tuple[Tensors, Tensors]:
        """Return the summary of each row at each of its columns; see the base."""
        everything = torch.ones((), dtype=torch.bool, device=x.query.device)
        width = x.value.shape[-1]
        both = torch.cat([x.value, x.key], -1)  # summed by the same weights
        value, key = attend(part("row", x.query, x.key, both, everything, dropout=x.dropout)).split(
            [width, x.key.shape[-1]], -1
        )
        if self.summary == "none":
            key = x.key
        elif self.summary != "wsum":
            assert x.hidden is not None
            key = self.project(value if self.summary == "proj" else key, x.hidden, x.dropout)
        return {"key": key, "value": value}, {}

    def step_parts(self, query: Tensor, state: GridState, column: Tensor, row: Tensor) -> list[Part]:
        """Return the items at the new token's column; see the base."""
        key, value = (_at_column(state.spans[name], column) for name in ("key", "value"))
        return [part("column", query, key, value, self._earlier(state, row), self.columns)]


class AxialMixture(Fixed):
    """Own row up to the query, own column in earlier rows, and spans of all that is left of both.

    Spans: each other column in earlier rows; the left and the right part of each earlier row. A token that is in
    neither own row nor own column is covered by both kinds. The spans have no dropout.
    """

    def spans(self, x: Tokens) -> tuple[Tensors, Tensors]:
        """Return keys, values and side spans of each row, and the column spans; see the base."""
        left, right = (self._span(x, "row", reverse) for reverse in (False, True))
        above = self._span(x, "column", False)
        spans = {"key": x.key[:, :: x.groups], "value": x.value[:, :: x.groups]}
        spans |= {"left_key": left.key, "left_value": left.value, "right_key": right.key, "right_value": right.value}
        return spans, {"query": above.query, "key": above.key, "value": above.value}

    def _span(self, x: Tokens, axis: Axis, reverse: bool, dropout: float = 0.0) -> Span:
        return running_span(
            x.pooled_query, x.pooled_key, x.key, x.value,
            axis=axis, pool=self.pool, seen=x.real, reverse=reverse, dropout=dropout,
        )  # fmt: skip

    def parts(self, x: Tokens, spans: Tensors, running: Tensors) -> list[Part]:
        """Return the items of all tokens of a grid."""
        rows, device = x.query.shape[2], x.query.device
        row, column = torch.arange(rows, device=device), torch.arange(self.columns, device=device)
        earlier = _below(rows, device)[:, None]
        others = (column[:, None] != column) & (row > 0)[:, None, None]
        sides = [
            part("column", x.query, spans[f"{side}_key"], spans[f"{side}_value"], earlier & (size > 0), size)
            for side, size in self._sides(column[:, None])
        ]
        return [
            part("row", x.query, x.key, x.value, _below(self.columns, device, 0)),
            part("column", x.query, x.key, x.value, earlier),
            part("row", x.query, running["key"], running["value"], others, row[:, None, None]),
            *sides,
        ]

    def _sides(self, column: Tensor) -> list[tuple[str, Tensor]]:
        """Return the names and sizes of the spans on both sides of columns."""
        return [("left", column), ("right", self.columns - 1 - column)]

    def step_parts(self, query: Tensor, state: GridState, column: Tensor, row: Tensor) -> list[Part]:
        """Return the items of the own column, the other columns and both sides; see the base."""
        at = {name: _at_column(value, column) for name, value in state.spans.items()}
        groups = query.shape[1] // at["key"].shape[1]
        key, value = (at[name].repeat_interleave(groups, 1) for name in ("key", "value"))
        earlier, place = self._earlier(state, row), (slice(None), None, None, None, None)
        others = (torch.arange(self.columns, device=row.device) != column[:, None]) & (row > 0)[:, None]
        above_key, above_value = (state.running[name][:, :, None] for name in ("key", "value"))
        sides = [
            part("column", query, at[f"{side}_key"], at[f"{side}_value"], earlier & (size > 0)[place], size[place])
            for side, size in self._sides(column)
        ]
        return [
            part("column", query, key, value, earlier),
            part("row", query, above_key, above_value, others[:, None, None, None], row[place]),
            *sides,
        ]

    def running_after(self, x: Tokens, state: GridState, row: Tensor, done: Tensor) -> Tensors:
        """Return the column spans with one more row; see the base."""
        count = row[done, None, None, None]
        pools = {}
        for name, new in (("query", x.pooled_query), ("key", x.pooled_key)):
            before, new = state.running[name][done], new[:, :, 0]
            pools[name] = torch.where(count > 0, merged(before, new, self.pool, count), new)
        key, value = (state.spans[name][done].repeat_interleave(x.groups, 1) for name in ("key", "value"))
        seen = (torch.arange(key.shape[2], device=key.device) <= row[done, None])[:, None, None, None]
        spans = attend(part("column", pools["query"][:, :, None], key, value, seen))
        return {**pools, "value": spans[:, :, 0]}


class BidirectionalMixture(AxialMixture):
    """Own row and own column, both in full, and spans above, below, left and right, for encoders.

    Above and below: every column of the query's row, its own included; left and right: the part of every row on that
    side of the query's column, its own included. A token attends to itself twice, through row and column.
    """

    def parallel(self, x: Tokens, keep: bool = False) -> tuple[Tensor, None]:
        """Return the outputs [B, H, L, D] of a sequence."""
        length = x.query.shape[2]
        grid = x.on_grid(self.columns, -(-length // self.columns))
        real = grid.real[..., 0]
        row_keys, column_keys = real[:, :, :, None], real.mT[:, :, None]  # of scores [.., R, C, C] and [.., R, C, R]
        parts = [
            part("row", grid.query, grid.key, grid.value, row_keys),
            part("column", grid.query, grid.key, grid.value, column_keys),
        ]
        directions: tuple[tuple[Axis, Axis], ...] = (("column", "row"), ("row", "column"))
        for axis, across in directions:
            for reverse in (False, True):
                span = self._span(grid, axis, reverse, x.dropout)
                size = span.size[:, :, :, None] if across == "row" else span.size.mT[:, :, None]
                parts.append(part(across, grid.query, span.key, span.value, size > 0, size))
        return joint_attention(parts, self.size_bias).flatten(2, 3)[:, :, :length], None
