"""What a drafter is to the loop: it starts a session for a run, proposes trees, and hears what became of them.

    class Mine:
        needs_hidden = False
        def start(self, run): return by_row(run, lambda prompt: MyRow(prompt))

    class MyRow:
        def propose(self, room): ...      # -> TokenTree whose root is the last token seen
        def observe(self, step): ...      # step.tokens were emitted

A drafter that works on all rows at once (one batched pass of a draft model, heads over the target's hidden states)
returns a `Session` of its own from `start`. One that drafts inside the target's pass gives its session a `forward`,
which then makes that pass (`PassingSession`).

Dimension letters: B rows in the pass, Q nodes of a row in the pass, P prompt tokens, N nodes, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from intaglio.speculative.target_model import Inputs, Reader
from intaglio.speculative.tree import TokenTree


@dataclass(frozen=True, eq=False)
class Run:
    """One call of `generate`, as a drafter sees it before the first pass.

    Args:
        model: the target, a stock causal language model.
        prompts: token ids of each row, without padding.
        sampling: whether tokens are drawn (`do_sample=True`); otherwise greedy.
        config: the merged generation config (`temperature`, `top_k`, `top_p`, `eos_token_id`, ...).
        limit: most new tokens a row.
        generator: what the loop draws from; None for torch's global generator. A drafter that draws uses it too, and
            one that draws nothing must leave it alone.
        prepack: whether a model that drafts is run from weights laid out beforehand; see `prepack.prepacked`.
    """

    model: Any
    prompts: tuple[tuple[int, ...], ...]
    sampling: bool
    config: Any
    limit: int
    generator: torch.Generator | None = None
    prepack: bool | None = False


@dataclass(frozen=True, eq=False)
class Step:
    """What one pass did for one row.

    The rows that the pass added to the target's cache are those of `path`: the root and the accepted nodes but for a
    last one, whose token the target has not read yet. `tokens[j]` is what follows `path[j]`, and `hidden[j]` belongs to
    `path[j]`. The first step of a run is the prefill: there is no tree, `tokens` is the first new token and `hidden`
    belongs to the prompt.

    Args:
        row: index of the row in `Run.prompts`.
        tokens: the tokens emitted, in order, at least one; cut at a stop token.
        drafted: how many of them, from the front, were drafted (the rest, at most one, is the target's own).
        tree: what was verified; None at the prefill. The loop may have cut it (`TokenTree.cut`) to the room left.
        path: nodes of `tree` whose rows were kept, the root first, as many as `tokens`; empty at the prefill.
        hidden: the target's last hidden states (after its final norm) at `path` [len(path), D], or [P, D] of the prompt
            at the prefill; None unless the drafter's `needs_hidden`. At the prefill of a run that continues a cache,
            P counts only what was not in it.
        logits: the target's raw logits at the tree's nodes [N, V] (at the prefill [1, V], those of `tokens[0]`), of the
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
class Pass:
    """The arguments of one tree pass of the target, for a session that makes the pass itself.

    Args:
        model: the target.
        rows: index in `Run.prompts` of each row of the pass [B]; ended rows are dropped from cache and pass.
        trees: the tree of each row [B].
        inputs: the nodes' tokens, positions and masks [B, Q, ...], padded behind with nodes that see only themselves. A
            session that adds slots of its own extends `inputs.visible_BQK` and calls `reader.masks`.
        reader: the target's cache, with the lengths and paddings of its rows.
    """

    model: Any
    rows: Sequence[int]
    trees: Sequence[TokenTree]
    inputs: Inputs
    reader: Reader


class Session(Protocol):
    """A drafter at work in one run, for all of its rows."""

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> Sequence[TokenTree]:
        """Draft a tree for each row that goes on.

        Args:
            rows: indices in `Run.prompts`, increasing.
            room: most drafted tokens that each row can still use, at least 0; what lies deeper in a tree is cut off.

        Returns:
            one tree a row, in the same order; its root is the last token that `observe` showed for the row.
        """

    def observe(self, steps: Sequence[Step]) -> None:
        """Hear what the last pass did: once after the prefill, then after every pass.

        Args:
            steps: one a row of the pass, in the order of `rows`; those that ended included.
        """


@runtime_checkable
class PassingSession(Protocol):
    """A session that also makes the target's tree passes, because it drafts inside them.

    The prefill is still the loop's: where nothing has been drafted yet, `propose` gives the root alone.
    """

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> Sequence[TokenTree]:
        """As `Session.propose`."""

    def observe(self, steps: Sequence[Step]) -> None:
        """As `Session.observe`."""

    def forward(self, call: Pass) -> Tensor:
        """Run the target over the trees and draft on the way.

        Args:
            call: what the loop would have called the model with. The cache must be left with exactly Q more rows, the
                trees' nodes; rows of the session's own are cropped from it again.

        Returns:
            the target's logits at the trees' nodes [B, Q, V], equal to a pass without the drafting.
        """


class Drafter(Protocol):
    """Where guesses come from: a table, the context, a smaller model, heads. Holds what outlives a run.

    Attributes:
        needs_hidden: whether its sessions read `Step.hidden`.
    """

    needs_hidden: bool

    def start(self, run: Run) -> Session:
        """Begin a run; no state of an earlier one may show, unless the drafter says so in its documentation.

        Args:
            run: what is known before the first pass.

        Raises:
            IntaglioError: the drafter does not fit the target (another vocabulary, another model's heads).
        """


class RowSession(Protocol):
    """A drafter at work on one row."""

    def propose(self, room: int) -> TokenTree:
        """Draft a tree whose root is the last token observed.

        Args:
            room: most drafted tokens that the row can still use, at least 0.
        """

    def observe(self, step: Step) -> None:
        """Hear what the last pass did for the row.

        Args:
            step: its tokens, the prefill's first.
        """


class _ByRow:
    """A session made of one session a row."""

    def __init__(self, sessions: list[RowSession]) -> None:
        self._sessions = sessions

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> list[TokenTree]:
        return [self._sessions[row].propose(left) for row, left in zip(rows, room, strict=True)]

    def observe(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self._sessions[step.row].observe(step)


def by_row(run: Run, make: Callable[[Sequence[int]], RowSession]) -> Session:
    """The session of a drafter that treats every row apart.

    Args:
        run: the run.
        make: called with a row's prompt (token ids) for its session.
    """
    return _ByRow([make(prompt) for prompt in run.prompts])
