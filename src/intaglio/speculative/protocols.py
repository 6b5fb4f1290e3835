"""Protocols of a drafter: it starts a session for a run, which proposes trees and observes what became of them.

    class Mine:
        needs_hidden = False
        def start(self, run): return by_row(run, lambda prompt: MyRow(prompt))

    class MyRow:
        def propose(self, room): ...      # -> TokenTree whose root is the last token seen
        def observe(self, step): ...      # step.tokens were emitted

A drafter that works on all rows at once (one batched pass of a draft model, heads over the target's hidden states)
returns a `Session` of its own from `start`. If it drafts inside the target's pass, its session has a `forward`, which
then makes that pass (`ForwardSession`). If it decides itself which tokens are emitted, its session has an `accept`
(`AcceptingSession`).

Dimension letters: B rows in the pass, Q nodes of a row in the pass, P prompt tokens, N nodes, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from intaglio.speculative.acceptance import Accepted, TokenSelector
from intaglio.speculative.pass_cost import FIXED, PassCosts
from intaglio.speculative.sequences import SequenceState
from intaglio.speculative.statistics import Statistics
from intaglio.speculative.target_model import CachedModel, Inputs
from intaglio.speculative.tree import TokenTree


@dataclass(frozen=True, eq=False)
class DecodingRun:
    """One call of `generate`, as a drafter sees it before the first pass.

    Args:
        model: the target, a stock causal language model.
        prompts: token ids of each row, without padding.
        sampling: whether tokens are drawn (`do_sample=True`); otherwise greedy.
        config: the merged generation config (`temperature`, `top_k`, `top_p`, `eos_token_id`, ...).
        limit: most new tokens of a row.
        generator: source of the loop's draws; None for torch's global generator. A drafter that draws uses it too, and
            a drafter that draws nothing must leave it alone.
        prepack: whether a draft model runs from weights laid out beforehand; see `prepacked_linear.prepacked`.
        costs: returns the costs of passes over the rows, measured at the first use on a machine. Default: fixed costs.
        branches: whether the target reads trees that branch; otherwise the loop keeps the first child of every node.
        statistics: of the run; a drafter with statistics of its own (`new_statistics`) counts there.
    """

    model: Any
    prompts: tuple[tuple[int, ...], ...]
    sampling: bool
    config: Any
    limit: int
    generator: torch.Generator | None = None
    prepack: bool | None = False
    costs: Callable[[], PassCosts] = lambda: FIXED
    branches: bool = True
    statistics: Statistics = field(default_factory=Statistics)


@dataclass(frozen=True, eq=False)
class Step:
    """Result of one pass for one row.

    The rows that the pass added to the target's cache are those of `path`: the root and the accepted nodes except a
    last one whose token the target has not read yet. `tokens[j]` follows `path[j]`, and `hidden[j]` belongs to
    `path[j]`. The first step of a run is the prefill: there is no tree, `tokens` is the first new token and `hidden`
    belongs to the prompt.

    Args:
        row: index in `DecodingRun.prompts`.
        tokens: the tokens emitted, in order, at least one; cut at a stop token.
        drafted: how many of them, from the front, were drafted (the rest, at most one, is the target's own).
        tree: the verified tree; None at the prefill. The loop may have truncated it to the room left.
        path: nodes of `tree` whose rows were kept, the root first, as many as `tokens`; empty at the prefill.
        hidden: the target's last hidden states (after its final norm) at `path` [len(path), D], or [P, D] of the prompt
            at the prefill; None unless the drafter's `needs_hidden`. At the prefill of a run that continues a cache,
            P counts only the tokens that were not in it.
        logits: the target's raw logits at the tree's nodes [N, V] (at the prefill [1, V], those of `tokens[0]`), in the
            model's dtype. A view: keep no reference past `observe`.
        done: whether the row has ended.
    """

    row: int
    tokens: Sequence[int]
    drafted: int
    tree: TokenTree | None
    path: Sequence[int]
    hidden: Tensor | None
    logits: Tensor
    done: bool


@dataclass(frozen=True, eq=False)
class TreePass:
    """Arguments of one tree pass of the target, for a session that makes the pass itself.

    Args:
        model: the target.
        rows: index in `DecodingRun.prompts` of each row of the pass [B]; ended rows are dropped from cache and pass.
        trees: tree of each row [B].
        inputs: tokens, positions and masks of the nodes [B, Q, ...], right-padded with nodes that see only themselves.
            A session that adds slots of its own extends `inputs.visible_BQK` and calls `target_model.masks`.
        cached: the target's cache, with the lengths and paddings of its rows.
    """

    model: Any
    rows: Sequence[int]
    trees: Sequence[TokenTree]
    inputs: Inputs
    cached: CachedModel


class Session(Protocol):
    """A drafter at work in one run, for all of its rows."""

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> Sequence[TokenTree]:
        """Draft a tree for each active row.

        Args:
            rows: indices in `DecodingRun.prompts`, increasing.
            room: most drafted tokens that each row can still use, at least 0; deeper levels of a tree are cut off.

        Returns:
            one tree per row, in the same order; its root is the last token that `observe` got for the row.
        """

    def observe(self, steps: Sequence[Step]) -> None:
        """Take in the results of the last pass: once after the prefill, then after every pass.

        Args:
            steps: of the rows of the pass, in order; ended rows included.
        """


@runtime_checkable
class ForwardSession(Protocol):
    """A session that also makes the target's tree passes, because it drafts inside them.

    The prefill remains the loop's: where nothing has been drafted yet, `propose` returns the root alone.
    """

    def forward(self, call: TreePass) -> Tensor:
        """Run the target over the trees and draft on the way.

        The cache must be left with exactly Q more rows, the trees' nodes; rows of the session's own are cropped again.

        Returns:
            the target's logits at the trees' nodes [B, Q, V], equal to a pass without the drafting.
        """


@runtime_checkable
class AcceptingSession(Protocol):
    """A session with an acceptance policy of its own; without, acceptance is lossless (`acceptance.verify_tree`).

    Tokens that it emits before the target has read them stand at the beginning of the next tree, as a chain.
    """

    def accept(
        self, selector: TokenSelector, row: SequenceState, index: int, tree: TokenTree, logits_NV: Tensor
    ) -> list[Accepted]:
        """Append the emitted tokens to the row and return them; see `acceptance.AcceptancePolicy`."""


class Drafter(Protocol):
    """Source of guesses: a table, the context, a smaller model, heads. Holds what outlives a run.

    Attributes:
        needs_hidden: whether its sessions read `Step.hidden`.
    """

    needs_hidden: bool

    def start(self, run: DecodingRun) -> Session:
        """Start a run; no state of an earlier one may show, unless the drafter documents it.

        Raises:
            IntaglioError: the drafter does not fit the target (another vocabulary, another model's heads).
        """


class RowSession(Protocol):
    """A drafter at work on one row; see `Session`."""

    def propose(self, room: int) -> TokenTree:
        """Draft a tree whose root is the last token observed."""

    def observe(self, step: Step) -> None:
        """Take in the result of the last pass, the prefill's first."""


class _ByRow:
    """A session made of one session per row."""

    def __init__(self, sessions: list[RowSession]) -> None:
        self._sessions = sessions

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> list[TokenTree]:
        return [self._sessions[row].propose(most) for row, most in zip(rows, room, strict=True)]

    def observe(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self._sessions[step.row].observe(step)


def by_row(run: DecodingRun, make: Callable[[Sequence[int]], RowSession]) -> Session:
    """Return the session of a drafter that treats every row apart; `make` gets a row's prompt."""
    return _ByRow([make(prompt) for prompt in run.prompts])
