"""State of one sequence of the batch while it is generated, and the conditions that end it.

Dimension letters: L tokens of the sequence, padding of the prompt included.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from intaglio.speculative.request import Request


class SequenceState:
    """One sequence of the output.

    Args:
        index: row of the batch.
        buffer_L: where its tokens go, int64, as long as it can get; the prompt is written in.
        request: stop tokens, stopping criteria and limits.

    Attributes:
        length: tokens written.
        last: the last of them.
        unread: emitted tokens that the target has not read yet, the first one first.
        done: whether it has ended.
        stopped_at: length at which a criterion was first met, where sequences end together.
        scores: what the stopping criteria get beside the tokens.
    """

    def __init__(self, index: int, buffer_L: Tensor, request: Request) -> None:
        self.index = index
        self._buffer_L = buffer_L
        self._request = request
        self.length = request.ids_BP.shape[1]
        buffer_L[: self.length] = request.ids_BP[index]
        self.last = int(buffer_L[self.length - 1])
        self.unread: list[int] = []
        self.limit = request.max_length
        self.done = False
        self.stopped_at: int | None = None
        self.scores: Any = None

    @property
    def ids(self) -> Tensor:
        """Prompt and new tokens [1, L], a view."""
        return self._buffer_L[None, : self.length]

    @property
    def remaining(self) -> int:
        """New tokens that it may still take."""
        return self.limit - self.length

    def append(self, token: int) -> None:
        """Write one token and check whether it ends the sequence."""
        self._buffer_L[self.length] = token
        self.length += 1
        self.last = token
        self.done = token in self._request.stops or self.length >= self.limit
        for criterion in self._request.criteria:
            if bool(criterion(self.ids, self.scores)):
                if self._request.together:
                    self.stopped_at = self.length if self.stopped_at is None else self.stopped_at
                else:
                    self.done = True


def stop_together(rows: list[SequenceState]) -> None:
    """Once every sequence has met a criterion, cut all of them at the longest length that needed it."""
    stopped = [row.stopped_at for row in rows]
    if None in stopped:
        return
    limit = max(length for length in stopped if length is not None)
    for row in rows:
        row.limit = min(row.limit, limit)
        row.length = min(row.length, limit)
        row.done = row.length >= row.limit
