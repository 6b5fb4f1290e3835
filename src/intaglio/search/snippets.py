"""Excerpts of documents around the words that match a query."""

from __future__ import annotations

from collections.abc import Sequence

CONTEXT = 60
"""Characters shown before the first match."""

Piece = tuple[str, bool]
"""A part of an excerpt, and whether it matches."""


def snippet(text: str, spans: Sequence[tuple[int, int]], max_length: int = 300) -> list[Piece]:
    """Return the excerpt with the most distinct matching words, cut at blanks, as pieces.

    Args:
        text: of the document.
        spans: (start, stop) of its matching words, in characters; disjoint and ascending.
        max_length: in characters. Default 300.
    """
    start = _start(text, spans, max_length)
    end = len(text)
    if start + max_length < end:
        end = start + max_length
        end = next((at for at in range(end, max(start, end - CONTEXT), -1) if text[at].isspace()), end)
    pieces: list[Piece] = [("… " if start else "", False)]
    position = start
    for first, last in spans:
        if position <= first and last <= end:
            pieces += [(text[position:first], False), (text[first:last], True)]
            position = last
    pieces += [(text[position:end].rstrip(), False), (" …" if end < len(text) else "", False)]
    return [piece for piece in pieces if piece[0]]


def _start(text: str, spans: Sequence[tuple[int, int]], max_length: int) -> int:
    """Return the start of the best excerpt, after a blank shortly before its first match."""
    best, start = 0, 0
    for first, _ in spans:
        left = max(0, first - CONTEXT)
        words = {text[a:b].casefold() for a, b in spans if left <= a and b <= left + max_length}
        if len(words) > best:
            best, start = len(words), left
    # The last excerpt that is full.
    start = min(start, max(0, len(text) - max_length))
    stop = min((a for a, _ in spans if a >= start), default=start)
    return next((at + 1 for at in range(start, stop) if start and text[at].isspace()), start)
