"""Prompt lookup: draft the tokens that followed an earlier occurrence of the last tokens.

Source: Saxena, Prompt Lookup Decoding, 2023 (one chain, the first match); here several matches become a tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from intaglio.speculative._utils import check_count
from intaglio.speculative.pass_cost import FIXED, PassCosts, prune_by_cost
from intaglio.speculative.protocols import DecodingRun, Session, Step, by_row
from intaglio.speculative.tree import TokenTree, trie

_STEP = 0.2
"""Weight of the last match in the shares that came true."""
_FIRST = 0.6
"""Scale of these shares before any match, which grow with its length."""


class PromptLookup:
    """Drafts from the row's own context, prompt and output.

    For n from `longest` down to 1, earlier occurrences of the last n tokens are looked up, the latest first; the tokens
    after each are a candidate. The candidates are merged into one tree. Nothing is loaded.

    Where passes were measured (`speculative.pass_cost`), only the part of the tree is verified that is expected to be
    worth its cost. The chance of a token is the decaying share of the tokens that came true after matches of its
    length; the i-th token after a match of n has that of n + i.

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
        costs = run.costs()
        return by_row(run, lambda prompt: _Context(self, prompt, costs))


class _Context:
    """Tokens of one row, where each short n-gram of them ends, and how often matches of each length came true."""

    def __init__(self, settings: PromptLookup, prompt: Sequence[int], costs: PassCosts = FIXED) -> None:
        self._settings, self._costs = settings, costs
        self._shares = [_FIRST * n / (settings.longest + 1) for n in range(settings.longest + 1)]
        self._guess: tuple[int, tuple[int, ...]] = (0, ())  # length of the match, and what followed it
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
        n, guess = self._guess
        for i, (token, emitted) in enumerate(zip(guess, step.tokens, strict=False)):
            place = min(n + i, self._settings.longest)
            self._shares[place] += _STEP * ((token == emitted) - self._shares[place])
            if token != emitted:
                break
        self._append(step.tokens)

    def propose(self, room: int) -> TokenTree:
        settings, ids = self._settings, self._ids
        length = min(settings.length, room)
        candidates: dict[tuple[int, ...], int] = {}
        for n in range(min(settings.longest, len(ids)), 0, -1):
            # A frequent token has many occurrences: the latest few are enough.
            for position in self._after.get(tuple(ids[-n:]), [])[: -4 * settings.candidates - 1 : -1]:
                if len(candidates) >= settings.candidates or not length:
                    break
                candidates.setdefault(tuple(ids[position : position + length]), n)
        tree = trie(ids[-1], candidates, settings.nodes)
        self._guess = next(((n, path) for path, n in candidates.items()), (0, ()))
        if not self._costs.measured:
            return tree
        return tree.subtree(prune_by_cost(self._probs(tree, candidates), lambda k: self._costs.cost(1 + k)))

    def _probs(self, tree: TokenTree, candidates: Mapping[tuple[int, ...], int]) -> list[float]:
        """Return the chance of each node; a later candidate has what the earlier ones leave."""
        children = {(tree.parents[node], tree.tokens[node]): node for node in range(1, len(tree))}
        probs, left = [1.0] + [0.0] * (len(tree) - 1), [1.0] * len(tree)
        for path, n in candidates.items():
            node = 0
            for i, token in enumerate(path):
                parent, node = node, children.get((node, token), 0)
                if not node:
                    break
                if not probs[node]:
                    chance = left[parent] * self._shares[min(n + i, self._settings.longest)]
                    left[parent] -= chance
                    probs[node] = probs[parent] * chance
        return probs
