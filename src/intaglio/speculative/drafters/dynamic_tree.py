"""Trees that grow by the distributions of a draft: what every drafter with a draft has in common.

How a tree grows is said by a generator: it yields nodes, and is sent the draft's law after each of them. So a growth
reads like its algorithm, and the nodes that the rows of a batch ask for at the same time are read in one pass.

    def chain(tree):                          # three drawn tokens
        for node in range(3):
            law_NV = yield [node]
            tree.q[node] = law_NV[0]
            tree.add(node, int(torch.multinomial(law_NV[0], 1)))

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
from intaglio.speculative.drafters.ngrams import NGramStore
from intaglio.speculative.prepacked_linear import prepacked
from intaglio.speculative.protocols import Run, Step
from intaglio.speculative.target_model import Reader
from intaglio.speculative.tree import TokenTree


class Growing:
    """The tree of one row while it grows.

    Args:
        root: the last token emitted.
        room: the deepest level that can be used.

    Attributes:
        tokens: of each node, the root first.
        parents: of each node; -1 for the root.
        depths: of each node; 0 for the root.
        q: the law [V] that the children of a node were drawn from, as `TokenTree` takes it.
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
        """Give a node its next child; returns the child.

        Args:
            parent: a node.
            token: the child's.
        """
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        return len(self.tokens) - 1

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child to `node`; none for the root.

        Args:
            node: an index.
        """
        found = []
        while node > 0:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def finished(self, depth_first: bool = False) -> tuple[TokenTree, list[int]]:
        """The tree as the loop takes it, and which of these nodes each of its nodes is.

        Args:
            depth_first: put the nodes in depth-first order. Default false: as in `kept`, or as they were added.
        """
        order = list(range(len(self))) if self.kept is None else self.kept
        if depth_first:
            order = self._depth_first(order)
        place = {node: index for index, node in enumerate(order)}
        branching = {self.parents[node] for node in order}
        tree = TokenTree(
            [self.tokens[node] for node in order],
            [place.get(self.parents[node], -1) for node in order],
            {place[node]: law for node, law in self.q.items() if node in branching} or None,
        )
        return tree, order

    def _depth_first(self, order: Sequence[int]) -> list[int]:
        children: dict[int, list[int]] = {node: [] for node in order}
        for node in reversed(order[1:]):
            children[self.parents[node]].append(node)  # the last one first: a stack turns them round
        found, waiting = [], [0]
        while waiting:
            found.append(waiting.pop())
            waiting += children[found[-1]]
        return found


Growth = Generator[Sequence[int], Tensor, Any]
"""Yields nodes that no one has asked for yet, whose parents have been asked for; is sent their laws [N, V]."""
Law = Callable[[Tensor], Tensor]
"""From logits [..., V] to the distribution that is drafted from, float32."""


@dataclass
class Calls:
    """What a draft did in a run.

    Attributes:
        passes: forward passes of a draft model, its prefill included; look-ups of several nodes at once in a table.
        nodes: nodes whose law was asked for, over all rows.
    """

    passes: int = 0
    nodes: int = 0


class Draft(Protocol):
    """Gives the draft's logits after the nodes of growing trees, row by row, and remembers what was accepted."""

    calls: Calls

    def begin(self, rows: Sequence[int], trees: Sequence[Growing]) -> None:
        """Start new trees.

        Args:
            rows: indices in `Run.prompts`, increasing; rows that are missing have ended.
            trees: of each, the root alone.
        """

    def read(self, wanted: Sequence[Sequence[int]]) -> Sequence[Tensor]:
        """Logits [N, V] after the nodes wanted of each row; of any number of rows where none is wanted.

        Args:
            wanted: nodes of each row, as a `Growth` yields them.
        """

    def observe(self, row: int, tokens: Sequence[int], path: Sequence[int]) -> None:
        """Hear what was emitted; `close` follows when all rows have been told.

        Args:
            row: index in `Run.prompts`.
            tokens: emitted.
            path: nodes of the growing tree, the root first: `tokens[j]` follows `path[j]`. Empty at the prefill.
        """

    def close(self) -> None:
        """Take note that all rows have been observed."""


def check_draft_model(model: Any, run: Run) -> None:
    """Refuse a draft model that does not fit the target.

    Args:
        model: the draft model.
        run: the run it should draft for.

    Raises:
        IntaglioError: another vocabulary than the target's, or a context that is too short.
    """
    own, wanted = (int(found.config.get_text_config().vocab_size) for found in (model, run.model))
    if own != wanted:
        raise IntaglioError(
            f"the draft model knows {own} token ids and the target {wanted}; a draft model has the target's vocabulary"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = max(map(len, run.prompts)) + run.limit
    if context is not None and needed > context:
        raise IntaglioError(f"the draft model's context is {context} tokens; this run may need {needed}")


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts as one tensor [B, P], padded in front with id 0, and the mask [B, P] or None where nothing is padded.

    Args:
        prompts: token ids of each row.
        device: where the tensors go.
    """
    most = max(map(len, prompts))
    ids = torch.tensor([[0] * (most - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    if min(map(len, prompts)) == most:
        return ids, None
    return ids, torch.tensor([[0] * (most - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)


def draft_law(run: Run, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None) -> Law:
    """A function from a draft's logits to the distribution that it drafts from.

    Args:
        run: says whether and how the target samples.
        temperature: of the draft; None for the target's, or 1 where the target is greedy.
        top_k: keep the k most likely; None for the target's, or all where it is greedy.
        top_p: keep the smallest set with this probability; None likewise.
    """
    given = run.config if run.sampling else None
    return law_of(
        getattr(given, "temperature", None) if temperature is None else temperature,
        getattr(given, "top_k", None) if top_k is None else top_k,
        getattr(given, "top_p", None) if top_p is None else top_p,
    )


def law_of(temperature: float | None = None, top_k: int | None = None, top_p: float | None = None) -> Law:
    """A function from logits to a distribution, in the order in which `generate` warps them.

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

    def law(logits: Tensor) -> Tensor:
        scores = logits.float()
        for warp in warpers:
            scores = warp(None, scores)
        return torch.softmax(scores, -1)

    return law


@dataclass
class _Row:
    """What the draft model knows of a row.

    Args:
        unread: tokens that it has not read, the root last.
        slots: pending slot of each node read in this step.
        chain: pending slots of `unread`, once it is read.
    """

    unread: list[int] = field(default_factory=list)
    slots: dict[int, int] = field(default_factory=dict)
    chain: list[int] = field(default_factory=list)


class ModelDraft:
    """A smaller model with its cache over all rows; a `Draft`.

    Nodes wait in the cache behind the row until the pass is observed: those of the accepted path stay, so that the
    model reads no token twice.

    Args:
        model: the draft model, with the target's vocabulary.
        run: the run; its prompts are read at once.
    """

    def __init__(self, model: Any, run: Run) -> None:
        self._device = run.model.device
        self._reader = Reader(model, prepacked=prepacked(model, run.prepack, run.limit))
        self._reader.prefill(*pad_left(run.prompts, model.device))
        self.calls = Calls(passes=1)
        self._known = {row: _Row() for row in range(len(run.prompts))}
        self._rows = list(self._known)
        self._trees: Sequence[Growing] = ()
        self._kept: dict[int, list[int]] = {}

    def begin(self, rows: Sequence[int], trees: Sequence[Growing]) -> None:
        """See `Draft.begin`."""
        if list(rows) != self._rows:
            self._reader.select([place for place, row in enumerate(self._rows) if row in rows])
            self._rows = list(rows)
        self._trees = trees
        for row in rows:
            self._known[row].slots, self._known[row].chain = {}, []

    def read(self, wanted: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `Draft.read`: one pass over all rows."""
        pending = self._reader.pending
        entries = [self._entries(row, nodes, pending) for row, nodes in zip(self._rows, wanted, strict=True)]
        most = max(map(len, entries))
        tokens = np.zeros((len(entries), most), dtype=np.int64)
        depths = np.zeros((len(entries), most), dtype=np.int64)
        seen = np.zeros((len(entries), most, pending + most), dtype=bool)
        seen[:, :, pending:] = np.eye(most, dtype=bool)  # what pads a row sees itself alone
        for place, row in enumerate(entries):
            for slot, (token, depth, visible) in enumerate(row):
                tokens[place, slot], depths[place, slot] = token, depth
                seen[place, slot, visible] = True
        logits_BQV = self._reader.extend(tokens, depths, seen)
        self.calls.passes += 1
        self.calls.nodes += sum(map(len, wanted))
        found = []
        for place, (row_index, nodes) in enumerate(zip(self._rows, wanted, strict=True)):
            slots = [self._known[row_index].slots[node] - pending for node in nodes]
            found.append(logits_BQV[place, slots].to(self._device))
        return found

    def _entries(self, row: int, nodes: Sequence[int], pending: int) -> list[tuple[int, int, list[int]]]:
        """Token, depth and visible pending slots of all that a row reads in this pass: what it has not read of its own
        text first, then the nodes.
        """
        known, tree = self._known[row], self._trees[self._rows.index(row)]
        found: list[tuple[int, int, list[int]]] = []
        if nodes and not known.chain:
            known.chain = list(range(pending, pending + len(known.unread)))
            known.slots[0] = known.chain[-1]
            found = [(token, place, known.chain[: place + 1]) for place, token in enumerate(known.unread)]
        for node in nodes:
            if node:
                known.slots[node] = pending + len(found)
                visible = known.chain + [known.slots[above] for above in tree.path(node)]
                found.append((tree.tokens[node], len(known.unread) - 1 + tree.depths[node], visible))
        return found

    def observe(self, row: int, tokens: Sequence[int], path: Sequence[int]) -> None:
        """See `Draft.observe`."""
        known = self._known[row]
        read = [node for node in path if node in known.slots]
        if read:
            self._kept[row] = [*known.chain, *(known.slots[node] for node in read[1:])]
            known.unread = list(tokens[len(read) - 1 :])
        else:
            self._kept[row] = []
            known.unread += tokens

    def close(self) -> None:
        """See `Draft.close`."""
        if self._reader.pending:
            self._reader.keep([self._kept[row] for row in self._rows])
        self._kept = {}


class TableDraft:
    """A table of n-grams as a draft: the law after a node is that of its last tokens; a `Draft`.

    Args:
        store: counted over the target's vocabulary.
        run: the run.
    """

    def __init__(self, store: NGramStore, run: Run) -> None:
        self._store = store
        self._most = len(store.tables)
        self._device = run.model.device
        self._ids = [list(prompt[-self._most :]) for prompt in run.prompts]
        self.calls = Calls()
        self._rows: Sequence[int] = ()
        self._trees: Sequence[Growing] = ()

    def begin(self, rows: Sequence[int], trees: Sequence[Growing]) -> None:
        """See `Draft.begin`."""
        self._rows, self._trees = rows, trees

    def read(self, wanted: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `Draft.read`."""
        self.calls.passes += 1
        self.calls.nodes += sum(map(len, wanted))
        found = []
        for row, tree, nodes in zip(self._rows, self._trees, wanted, strict=True):
            laws = [
                self._store.law([*self._ids[row], *(tree.tokens[above] for above in tree.path(node))]) for node in nodes
            ]
            logits_NV = torch.from_numpy(np.stack(laws)).log() if laws else torch.empty(0)
            found.append(logits_NV.to(self._device))
        return found

    def observe(self, row: int, tokens: Sequence[int], path: Sequence[int]) -> None:
        """See `Draft.observe`."""
        self._ids[row] = [*self._ids[row], *tokens][-self._most :]

    def close(self) -> None:
        """See `Draft.close`."""


class GrowingSession:
    """A session that grows a tree for every row of a pass; see `protocols.Session`.

    Args:
        draft: gives the laws.
        law: what they are made of its logits by.
        grow: called with the index of a row and its tree; makes the growth.
        depth_first: hand the trees' nodes on in depth-first order. Default false: as they grew.
    """

    def __init__(
        self, draft: Draft, law: Law, grow: Callable[[int, Growing], Growth], *, depth_first: bool = False
    ) -> None:
        self._draft = draft
        self._law = law
        self._grow = grow
        self._depth_first = depth_first
        self._last: dict[int, int] = {}
        self._orders: dict[int, list[int]] = {}

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> list[TokenTree]:
        """See `Session.propose`."""
        trees = [Growing(self._last[row], left) for row, left in zip(rows, room, strict=True)]
        self._draft.begin(rows, trees)
        growths = [self._grow(row, tree) for row, tree in zip(rows, trees, strict=True)]
        wanted = [next(growth, ()) for growth in growths]
        while any(map(len, wanted)):
            logits = self._draft.read(wanted)
            for place, (growth, nodes) in enumerate(zip(growths, wanted, strict=True)):
                if nodes:
                    wanted[place] = _send(growth, self._law(logits[place]))
        finished = [tree.finished(self._depth_first) for tree in trees]
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
        """Which node of the growing tree each node of a row's last tree was.

        No tree is cut by the loop, as none grows beyond the room.

        Args:
            row: index in `Run.prompts`.
        """
        return self._orders[row]


def _send(growth: Growth, laws_NV: Tensor) -> Sequence[int]:
    try:
        return growth.send(laws_NV)
    except StopIteration:
        return ()
