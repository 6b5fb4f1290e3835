"""Dynamically grown trees: the machinery of every drafter that expands a tree by a draft's distributions.

A growth is a generator: it yields nodes, and is sent the draft's distribution after each of them. So it reads like its
algorithm, and the nodes that the rows of a batch need at the same time are read in one pass.

    def chain(tree):                          # three drawn tokens
        for node in range(3):
            probs_NV = yield [node]
            tree.q[node] = probs_NV[0]
            tree.add(node, int(torch.multinomial(probs_NV[0], 1)))

A draft is a smaller model with a cache of its own, which is kept from step to step, or a table of n-grams.

Dimension letters: B rows, Q tokens of a row in a pass, R pending slots, N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from intaglio.errors import IntaglioError
from intaglio.speculative._utils import context_length
from intaglio.speculative.drafters.ngrams import NGramStore
from intaglio.speculative.prepacked_linear import prepacked
from intaglio.speculative.protocols import DecodingRun, Step
from intaglio.speculative.target_model import CachedModel
from intaglio.speculative.tree import TokenTree


class PartialTree:
    """The tree of one row while it grows.

    Args:
        root: the last token emitted.
        room: the deepest level that can be used.

    Attributes:
        tokens: of each node, the root first.
        parents: of each node; -1 for the root.
        depths: of each node; 0 for the root.
        q: the distribution [V] that the children of a node were drawn from, as in `TokenTree`.
        kept: nodes of the finished tree, the root first, parents before children and siblings in their order. Default
            None: all of them.
    """

    def __init__(self, root: int, room: int) -> None:
        self.room = room
        self.tokens, self.parents, self.depths = [root], [-1], [0]
        self.q: dict[int, Tensor] = {}
        self.kept: list[int] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int) -> int:
        """Add the next child of a node, and return it."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        return len(self.tokens) - 1

    def path(self, node: int) -> list[int]:
        """Return the nodes from the root's child to `node`; none for the root."""
        path = []
        while node > 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def finish(self, depth_first: bool = False) -> tuple[TokenTree, list[int]]:
        """Return the token tree, and for each of its nodes the node of this tree.

        Nodes are in depth-first order, or as in `kept`, or as they were added.
        """
        order = list(range(len(self))) if self.kept is None else self.kept
        if depth_first:
            order = self._depth_first(order)
        tree = TokenTree(self.tokens, self.parents, self.q)
        return tree.subtree(order), order

    def _depth_first(self, nodes: Sequence[int]) -> list[int]:
        children: dict[int, list[int]] = {node: [] for node in nodes}
        for node in reversed(nodes[1:]):
            children[self.parents[node]].append(node)  # the last one first: the stack reverses them
        order, waiting = [], [0]
        while waiting:
            order.append(waiting.pop())
            waiting += children[order[-1]]
        return order


Growth = Generator[Sequence[int], Tensor, Any]
"""Yields nodes not yet read whose parents have been read; is sent their distributions [N, V]."""
ProbsFn = Callable[[Tensor], Tensor]
"""From logits [..., V] to the distribution that is drafted from, float32."""


@dataclass
class DraftStats:
    """Work of a draft in a run.

    Attributes:
        passes: forward passes of a draft model, its prefill included; look-ups of several nodes at once in a table.
        nodes: nodes whose distribution was read, over all rows.
    """

    passes: int = 0
    nodes: int = 0


class Draft(Protocol):
    """Computes the draft's logits after the nodes of growing trees, and remembers the accepted ones."""

    calls: DraftStats

    def begin(self, rows: Sequence[int], trees: Sequence[PartialTree]) -> None:
        """Start new trees, of which there is only the root.

        Args:
            rows: indices in `DecodingRun.prompts`, increasing; rows that are missing have ended.
            trees: of each row.
        """

    def read(self, wanted: Sequence[Sequence[int]]) -> Sequence[Tensor]:
        """Return logits [N, V] after the nodes wanted of each row; of any number of rows if none is wanted."""

    def observe(self, row: int, tokens: Sequence[int], path: Sequence[int]) -> None:
        """Take in the emitted tokens of a row; `close` follows after all rows.

        `path` are nodes of the growing tree, the root first: `tokens[j]` follows `path[j]`. Empty at the prefill.
        """

    def close(self) -> None:
        """End the step after all rows have been observed."""


def check_draft_model(model: Any, run: DecodingRun) -> None:
    """Raise an `IntaglioError` if a draft model has another vocabulary or too short a context for the run."""
    own, wanted = (int(m.config.get_text_config().vocab_size) for m in (model, run.model))
    if own != wanted:
        raise IntaglioError(
            f"the draft model knows {own} token ids and the target {wanted}; a draft model has the target's vocabulary"
        )
    context = context_length(model)
    needed = max(map(len, run.prompts)) + run.limit
    if context is not None and needed > context:
        raise IntaglioError(f"the draft model's context is {context} tokens; this run may need {needed}")


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return prompts [B, P] left-padded with id 0, and their mask [B, P], or None if nothing is padded."""
    most = max(map(len, prompts))
    ids = torch.tensor([[0] * (most - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    if min(map(len, prompts)) == most:
        return ids, None
    return ids, torch.tensor([[0] * (most - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)


def draft_probs_fn(
    run: DecodingRun, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None
) -> ProbsFn:
    """Return `probs_fn` with the target's settings where None is given (1 and no filter for a greedy target)."""
    config = run.config if run.sampling else None
    return probs_fn(
        getattr(config, "temperature", None) if temperature is None else temperature,
        getattr(config, "top_k", None) if top_k is None else top_k,
        getattr(config, "top_p", None) if top_p is None else top_p,
    )


def probs_fn(temperature: float | None = None, top_k: int | None = None, top_p: float | None = None) -> ProbsFn:
    """Return a function from logits to a distribution, warped in the order of `generate`.

    Args:
        temperature: above 0. Default None: 1.
        top_k: keep the k most likely. Default None: all.
        top_p: keep the smallest set with this probability. Default None: all.
    """
    warpers: list[Any] = []
    if temperature is not None and temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))

    def to_probs(logits: Tensor) -> Tensor:
        scores = logits.float()
        for warp in warpers:
            scores = warp(None, scores)
        probs = torch.softmax(scores, -1)
        if bool(probs.isnan().any()):
            raise IntaglioError(
                "the draft's logits are NaN or infinite, so it gives no probabilities; use another draft"
            )
        return probs

    return to_probs


@dataclass
class _DraftRow:
    """State of a row in the draft model's cache.

    Args:
        unread: tokens that the model has not read, the root last.
        slots: pending slot of each node read in this step.
        chain: pending slots of `unread`, once it is read.
    """

    unread: list[int] = field(default_factory=list)
    slots: dict[int, int] = field(default_factory=dict)
    chain: list[int] = field(default_factory=list)


class CachedModelDraft:
    """A smaller model with its cache over all rows; a `Draft`.

    Nodes stay pending in the cache until the pass is observed: those of the accepted path stay, so that the model reads
    no token twice. The prompts are read at once.
    """

    def __init__(self, model: Any, run: DecodingRun) -> None:
        self._device = run.model.device
        self._cached = CachedModel(model, prepacked=prepacked(model, run.prepack, run.limit))
        self._cached.prefill(*pad_left(run.prompts, model.device))
        self.calls = DraftStats(passes=1)
        self._state = {row: _DraftRow() for row in range(len(run.prompts))}
        self._rows = list(self._state)
        self._trees: Sequence[PartialTree] = ()
        self._kept: dict[int, list[int]] = {}

    def begin(self, rows: Sequence[int], trees: Sequence[PartialTree]) -> None:
        """See `Draft.begin`."""
        if list(rows) != self._rows:
            self._cached.select_rows([index for index, row in enumerate(self._rows) if row in rows])
            self._rows = list(rows)
        self._trees = trees
        for row in rows:
            self._state[row].slots, self._state[row].chain = {}, []

    def read(self, wanted: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `Draft.read`: one pass over all rows."""
        pending = self._cached.pending
        entries = [
            self._entries(row, tree, nodes, pending)
            for row, tree, nodes in zip(self._rows, self._trees, wanted, strict=True)
        ]
        most = max(map(len, entries))
        tokens = np.zeros((len(entries), most), dtype=np.int64)
        depths = np.zeros((len(entries), most), dtype=np.int64)
        seen = np.zeros((len(entries), most, pending + most), dtype=bool)
        seen[:, :, pending:] = np.eye(most, dtype=bool)  # padding sees only itself
        for index, row_entries in enumerate(entries):
            for slot, (token, depth, visible) in enumerate(row_entries):
                tokens[index, slot], depths[index, slot] = token, depth
                seen[index, slot, visible] = True
        logits_BQV = self._cached.extend(tokens, depths, seen)
        self.calls.passes += 1
        self.calls.nodes += sum(map(len, wanted))
        return [
            logits_BQV[index, [self._state[row].slots[node] - pending for node in nodes]].to(self._device)
            for index, (row, nodes) in enumerate(zip(self._rows, wanted, strict=True))
        ]

    def _entries(
        self, row: int, tree: PartialTree, nodes: Sequence[int], pending: int
    ) -> list[tuple[int, int, list[int]]]:
        """Return token, depth and visible pending slots of all that a row reads: its unread text, then the nodes."""
        state = self._state[row]
        entries: list[tuple[int, int, list[int]]] = []
        if nodes and not state.chain:
            state.chain = list(range(pending, pending + len(state.unread)))
            state.slots[0] = state.chain[-1]
            entries = [(token, depth, state.chain[: depth + 1]) for depth, token in enumerate(state.unread)]
        for node in nodes:
            if node:
                state.slots[node] = pending + len(entries)
                visible = state.chain + [state.slots[above] for above in tree.path(node)]
                entries.append((tree.tokens[node], len(state.unread) - 1 + tree.depths[node], visible))
        return entries

    def observe(self, row: int, tokens: Sequence[int], path: Sequence[int]) -> None:
        """See `Draft.observe`."""
        state = self._state[row]
        read = [node for node in path if node in state.slots]
        if read:
            self._kept[row] = [*state.chain, *(state.slots[node] for node in read[1:])]
            state.unread = list(tokens[len(read) - 1 :])
        else:
            self._kept[row] = []
            state.unread += tokens

    def close(self) -> None:
        """See `Draft.close`."""
        if self._cached.pending:
            self._cached.keep_rows([self._kept[row] for row in self._rows])
        self._kept = {}


class TableDraft:
    """A table of n-grams as a `Draft`: the distribution after a node is that of its last tokens."""

    def __init__(self, store: NGramStore, run: DecodingRun) -> None:
        self._store = store
        self._most = len(store.tables)
        self._device = run.model.device
        self._ids = [list(prompt[-self._most :]) for prompt in run.prompts]
        self.calls = DraftStats()
        self._rows: Sequence[int] = ()
        self._trees: Sequence[PartialTree] = ()

    def begin(self, rows: Sequence[int], trees: Sequence[PartialTree]) -> None:
        """See `Draft.begin`."""
        self._rows, self._trees = rows, trees

    def read(self, wanted: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `Draft.read`."""
        self.calls.passes += 1
        self.calls.nodes += sum(map(len, wanted))
        logits = []
        for row, tree, nodes in zip(self._rows, self._trees, wanted, strict=True):
            probs = [
                self._store.probs([*self._ids[row], *(tree.tokens[above] for above in tree.path(node))])
                for node in nodes
            ]
            logits_NV = torch.from_numpy(np.stack(probs)).log() if probs else torch.empty(0)
            logits.append(logits_NV.to(self._device))
        return logits

    def observe(self, row: int, tokens: Sequence[int], path: Sequence[int]) -> None:
        """See `Draft.observe`."""
        self._ids[row] = [*self._ids[row], *tokens][-self._most :]

    def close(self) -> None:
        """See `Draft.close`."""


class DynamicTreeSession:
    """A session that grows a tree for every row of a pass; see `protocols.Session`.

    Args:
        draft: computes the logits.
        to_probs: from its logits to the distributions.
        grow: called with the index of a row and its tree; returns the growth.
        depth_first: order the trees' nodes depth first. Default false: as they grew.
    """

    def __init__(
        self,
        draft: Draft,
        to_probs: ProbsFn,
        grow: Callable[[int, PartialTree], Growth],
        *,
        depth_first: bool = False,
    ) -> None:
        self._draft = draft
        self._to_probs = to_probs
        self._grow = grow
        self._depth_first = depth_first
        self._last: dict[int, int] = {}
        self._orders: dict[int, list[int]] = {}

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> list[TokenTree]:
        """See `Session.propose`."""
        trees = [PartialTree(self._last[row], most) for row, most in zip(rows, room, strict=True)]
        self._draft.begin(rows, trees)
        growths = [self._grow(row, tree) for row, tree in zip(rows, trees, strict=True)]
        wanted = [next(growth, ()) for growth in growths]
        while any(map(len, wanted)):
            logits = self._draft.read(wanted)
            for index, (growth, nodes) in enumerate(zip(growths, wanted, strict=True)):
                if nodes:
                    wanted[index] = _send(growth, self._to_probs(logits[index]))
        finished = [tree.finish(self._depth_first) for tree in trees]
        self._orders = {row: order for row, (_, order) in zip(rows, finished, strict=True)}
        return [tree for tree, _ in finished]

    def observe(self, steps: Sequence[Step]) -> None:
        """See `Session.observe`."""
        for step in steps:
            self._last[step.row] = step.tokens[-1]
            path = [] if step.tree is None else [self.order_of(step.row)[node] for node in step.path]
            self._draft.observe(step.row, step.tokens, path)
        self._draft.close()

    def order_of(self, row: int) -> list[int]:
        """Return for each node of a row's last token tree the node of its partial tree.

        The loop truncates no tree, as none grows beyond the room.
        """
        return self._orders[row]


def _send(growth: Growth, probs_NV: Tensor) -> Sequence[int]:
    try:
        return growth.send(probs_NV)
    except StopIteration:
        return ()
