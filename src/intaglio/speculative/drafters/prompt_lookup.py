"""Prompt lookup: draft the tokens that followed an earlier occurrence of the last tokens.

Source: Saxena, Prompt Lookup Decoding, 2023 (one chain, the first match); here several matches become a tree.
"""

from __future__ import annotations

from collections.abc import Sequence

from intaglio.speculative._utils import check_count
from intaglio.speculative.protocols import DecodingRun, Session, Step, by_row
from intaglio.speculative.tree import TokenTree, trie


class PromptLookup:
    """Drafts from the row's own context, prompt and output.

    For n from `longest` down to 1, earlier occurrences of the last n tokens are looked up, the latest first; the tokens
    after each are a candidate. The candidates are merged into one tree. Nothing is learnt or loaded.

    Args:
        nodes: most drafted nodes of a tree. Default 15, so that a pass reads 16 tokens.
        longest: tokens of the longest match. Default 3.
        length: most tokens of a candidate. Default 10.
        candidates: most candidates. Default 3.

    Raises:
        IntaglioError: a setting below 1.
    """

    needs_hidden = False

    def __init__(self, nodes: int = 15, longest: int = 3, length: int = 10, candidates: int = 3) -> None:
        for name, value in (("nodes", nodes), ("longest", longest), ("length", length), ("candidates", candidates)):
            check_count(name, value)
        self.nodes = nodes
        self.longest = longest
        self.length = length
        self.candidates = candidates

    def start(self, run: DecodingRun) -> Session:
        """Start a run; see `Drafter.start`."""
        return by_row(run, lambda prompt: _Context(self, prompt))


class _Context:
    """Tokens of one row, and where each short n-gram of them ends."""

    def __init__(self, settings: PromptLookup, prompt: Sequence[int]) -> None:
        self._settings = settings
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], list[int]] = {}  # n-gram -> positions right after it
        self._append(prompt)

    def _append(self, tokens: Sequence[int]) -> None:
        ids = self._ids
        for token in tokens:
            here = len(ids)
            for n in range(1, min(self._settings.longest, here) + 1):
                self._after.setdefault(tuple(ids[here - n :]), []).append(here)
            ids.append(token)

    def observe(self, step: Step) -> None:
        self._append(step.tokens)

    def propose(self, room: int) -> TokenTree:
        settings, ids = self._settings, self._ids
        length = min(settings.length, room)
        candidates: dict[tuple[int, ...], None] = {}
        for n in range(min(settings.longest, len(ids)), 0, -1):
            # A frequent token has many occurrences: the latest few are enough.
            for position in self._after.get(tuple(ids[-n:]), [])[: -4 * settings.candidates - 1 : -1]:
                if len(candidates) >= settings.candidates or not length:
                    break
                candidates[tuple(ids[position : position + length])] = None
        return trie(ids[-1], candidates, settings.nodes)
