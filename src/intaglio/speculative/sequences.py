"""One row of the output as it grows, and what ends it.

Dimension letters: L tokens of the row, padding of the prompt included.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from intaglio.speculative.request import Request


class Row:
    """One row of the output.

    Args:
        index: which row of the batch it is.
        buffer_L: where its tokens go, int64, as long as the row can get; the prompt is written in.
        request: what ends it.

    Attributes:
        length: tokens written.
        last: the last of them.
        done: whether it has ended.
        met: the length at which a criterion was first met, where rows end together.
        scores: what the stopping criteria get beside the tokens.
    """

    def __init__(self, index: int, buffer_L: Tensor, request: Request) -> None:
        self.index = index
        self._buffer_L = buffer_L
        self._request = request
        self.length = request.ids_BP.shape[1]
        buffer_L[: self.length] = request.ids_BP[index]
        self.last = int(buffer_L[self.length - 1])
        self.limit = request.max_length
        self.done = False
        self.met: int | None = None
        self.scores: Any = None

    @property
    def ids(self) -> Tensor:
        """Prompt and new tokens [1, L], a view."""
        return self._buffer_L[None, : self.length]

    @property
    def left(self) -> int:
        """New tokens that it may still take."""
        return self.limit - self.length

    def append(self, token: int) -> None:
        """Write one token and see whether it ends the row.

        Args:
            token: its id.
        """
        self._buffer_L[self.length] = token
        self.length += 1
        self.last = token
        self.done = token in self._request.stops or self.length >= self.limit
        for criterion in self._request.criteria:
            if bool(criterion(self.ids, self.scores)):
                if self._request.together:
                    self.met = self.length if self.met is None else self.met
                else:
                    self.done = True


def end_together(rows: list[Row]) -> None:
    """Where rows end together: once every row has met a criterion, none goes beyond the longest that had to.

    Args:
        rows: all rows of the batch.
    """
    met = [row.met for row in rows]
    if None in met:
        return
    limit = max(length for length in met if length is not None)
    for row in rows:
        row.limit = min(row.limit, limit)
        row.length = min(row.length, limit)
        row.done = row.length >= row.limit
