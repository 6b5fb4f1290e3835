"""A smaller model that drafts: a chain or a tree of its own likely continuations.

Sources: Leviathan et al., Fast Inference from Transformers via Speculative Decoding, ICML 2023 (a chain); Miao et al.,
SpecInfer, ASPLOS 2024 (a tree of fixed widths).

Dimension letters: B rows, Q tokens of a row in a pass, R pending slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from intaglio.errors import IntaglioError
from intaglio.verify.drafters.lookup import check_count
from intaglio.verify.protocols import Run, Session, Step
from intaglio.verify.reader import Reader
from intaglio.verify.tree import TokenTree


class DraftModel:
    """Drafts with a smaller causal language model that has the target's vocabulary.

    The draft model reads each level of the tree in one pass and keeps its own cache from step to step: the accepted
    path's rows stay, so it reads no token twice. When the target samples, children are drawn without replacement from
    the draft's distribution, warped by the target's temperature, top-k and top-p, and the tree carries it as `q`; when
    the target is greedy they are the draft's most likely tokens.

    Args:
        model: the draft model.
        widths: children of each node, level by level; `(1,) * n` is a chain. Default five levels of one.
        confidence: a node whose most likely next token has a lower draft probability gets no children, 0 to 1.
            Default 0: every node gets them.
        temperature: of the draft when sampling, above 0. Default None: the target's.

    Raises:
        IntaglioError: no widths, a width below 1, a confidence outside 0 to 1, or a temperature that is not above 0.
    """

    needs_hidden = False

    def __init__(
        self,
        model: Any,
        widths: Sequence[int] = (1, 1, 1, 1, 1),
        *,
        confidence: float = 0.0,
        temperature: float | None = None,
    ) -> None:
        check_count("the number of widths", len(widths))
        for width in widths:
            check_count("a width", width)
        if not 0 <= confidence <= 1:
            raise IntaglioError(f"confidence is {confidence}; 0 to 1 is accepted")
        if temperature is not None and not temperature > 0:
            raise IntaglioError(f"temperature is {temperature}; it must be above 0")
        self.model = model
        self.widths = tuple(widths)
        self.confidence = confidence
        self.temperature = temperature

    def start(self, run: Run) -> Session:
        """Begin a run: the draft model reads the prompts; see `Drafter.start`.

        Raises:
            IntaglioError: another vocabulary than the target's, or a context that is too short.
        """
        check_draft_model(self.model, run)
        return _Drafting(self, run)


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


def draft_law(run: Run, temperature: float | None = None) -> Callable[[Tensor], Tensor]:
    """A function from a draft's logits [..., V] to the distribution that it drafts from, float32.

    Args:
        run: says whether and how the target samples; for a greedy target the law is the plain softmax.
        temperature: of the draft; None for the target's.
    """
    config = run.config
    warpers: list[Any] = []
    if run.sampling:
        heat = config.temperature if temperature is None else temperature
        if heat is not None and heat != 1.0:
            warpers.append(TemperatureLogitsWarper(float(heat)))
        if config.top_k:
            warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p is not None and config.top_p < 1.0:
            warpers.append(TopPLogitsWarper(config.top_p))

    def law(logits: Tensor) -> Tensor:
        scores = logits.float()
        for warp in warpers:
            scores = warp(None, scores)
        return torch.softmax(scores, -1)

    return law


@dataclass
class _Growing:
    """The tree of one row while it grows.

    Args:
        unread: tokens that the draft model has not read, the root last; they take the first pending slots.
        room: most levels.
    """

    unread: list[int]
    room: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=lambda: [-1])
    slots: dict[int, int] = field(default_factory=dict)
    q: dict[int, Tensor] = field(default_factory=dict)
    depth: dict[int, int] = field(default_factory=lambda: {0: 0})
    frontier: list[int] = field(default_factory=lambda: [0])
    tree: TokenTree | None = None

    def __post_init__(self) -> None:
        self.tokens.append(self.unread[-1])
        self.slots[0] = len(self.unread) - 1

    def add(self, parent: int, token: int) -> int:
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depth[node] = self.depth[parent] + 1
        return node

    def seen(self, node: int) -> list[int]:
        """Pending slots that a node sees: the unread chain, and its own path as far as it has been read."""
        found = list(range(len(self.unread)))
        while node > 0:
            if node in self.slots:
                found.append(self.slots[node])
            node = self.parents[node]
        return found


class _Drafting:
    """A session: the draft model's cache over all rows."""

    def __init__(self, settings: DraftModel, run: Run) -> None:
        self._settings = settings
        self._run = run
        self._law = draft_law(run, settings.temperature)
        self._reader = Reader(settings.model)
        self._reader.prefill(*pad_left(run.prompts, settings.model.device))
        self._rows = list(range(len(run.prompts)))
        self._unread: dict[int, list[int]] = {}
        self._trees: dict[int, _Growing] = {}

    def observe(self, steps: Sequence[Step]) -> None:
        kept = []
        for step in steps:
            growing = self._trees.get(step.row)
            if growing is None or step.tree is None:
                self._unread[step.row] = list(step.tokens)
                continue
            read = [node for node in step.path if node in growing.slots]
            kept.append([*range(len(growing.unread)), *(growing.slots[node] for node in read[1:])])
            self._unread[step.row] = list(step.tokens[len(read) - 1 :])
        if kept:
            self._reader.keep(kept)

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> list[TokenTree]:
        if list(rows) != self._rows:
            self._reader.select([place for place, row in enumerate(self._rows) if row in rows])
            self._rows = list(rows)
        depth = len(self._settings.widths)
        growing = [_Growing(self._unread[row], min(left, depth)) for row, left in zip(rows, room, strict=True)]
        self._trees = dict(zip(rows, growing, strict=True))
        logits = self._read_unread(growing)
        for level, width in enumerate(self._settings.widths):
            for tree, logits_QV in zip(growing, logits, strict=True):
                self._branch(tree, logits_QV, width, level)
            if level + 1 == depth or not any(tree.frontier and tree.room > level + 1 for tree in growing):
                break
            logits = self._read_level(growing)
        return [TokenTree(tree.tokens, tree.parents, tree.q or None) for tree in growing]

    def _branch(self, tree: _Growing, logits_QV: Tensor, width: int, level: int) -> None:
        """Give every node of the last level its children; `logits_QV` are those of the frontier, in order."""
        before, tree.frontier = tree.frontier, []
        if level >= tree.room or not before:
            return
        laws_QV = self._law(logits_QV[: len(before)])
        sure = (laws_QV.amax(-1) >= self._settings.confidence).tolist()
        for node, law_V, is_sure in zip(before, laws_QV, sure, strict=True):
            if not is_sure:
                continue
            if self._run.sampling:
                most = min(width, int((law_V > 0).sum()))
                tokens = torch.multinomial(law_V, most, generator=self._run.generator)
                tree.q[node] = law_V
            else:
                tokens = law_V.topk(min(width, len(law_V))).indices
            tree.frontier += [tree.add(node, token) for token in tokens.tolist()]

    def _read_unread(self, growing: list[_Growing]) -> Sequence[Tensor]:
        """Read the tokens since the last draft; the logits after each root, [1, V] a row."""
        most = max(len(tree.unread) for tree in growing)
        tokens = np.zeros((len(growing), most), dtype=np.int64)
        depths = np.zeros((len(growing), most), dtype=np.int64)
        seen = np.broadcast_to(np.eye(most, dtype=bool), (len(growing), most, most)).copy()
        for row, tree in enumerate(growing):
            count = len(tree.unread)
            tokens[row, :count] = tree.unread
            depths[row, :count] = np.arange(count)
            seen[row, :count, :count] = np.tri(count, dtype=bool)
        logits_BQV = self._reader.extend(tokens, depths, seen)
        return [logits_BQV[row, tree.slots[0]][None] for row, tree in enumerate(growing)]

    def _read_level(self, growing: list[_Growing]) -> Sequence[Tensor]:
        """Read every row's last level; its logits [Q, V] a row, padded behind."""
        most = max(len(tree.frontier) for tree in growing)
        pending = self._reader.pending
        tokens = np.zeros((len(growing), most), dtype=np.int64)
        depths = np.zeros((len(growing), most), dtype=np.int64)
        seen = np.zeros((len(growing), most, pending + most), dtype=bool)
        seen[:, :, pending:] = np.eye(most, dtype=bool)
        for row, tree in enumerate(growing):
            for place, node in enumerate(tree.frontier):
                tokens[row, place] = tree.tokens[node]
                depths[row, place] = len(tree.unread) - 1 + tree.depth[node]
                seen[row, place, tree.seen(node)] = True
                tree.slots[node] = pending + place
        return list(self._reader.extend(tokens, depths, seen))
