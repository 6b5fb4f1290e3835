"""A smaller model that drafts: a chain or a static tree of its own likely continuations.

Sources: Leviathan et al., Fast Inference from Transformers via Speculative Decoding, ICML 2023 (a chain); Miao et al.,
SpecInfer, ASPLOS 2024 (a tree of fixed widths); Chen et al., Sequoia, NeurIPS 2024 (the best tree,
`static_tree.best_tree`).

Dimension letters: N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.speculative.drafters.dynamic_tree import (
    CachedModelDraft,
    Draft,
    DraftStats,
    DynamicTreeSession,
    Growth,
    PartialTree,
    TableDraft,
    check_draft_model,
    draft_probs_fn,
)
from intaglio.speculative.drafters.ngrams import NGramStore
from intaglio.speculative.protocols import DecodingRun, Session
from intaglio.speculative.static_tree import StaticTree


class DraftModel:
    """Drafts with a smaller causal language model that has the target's vocabulary.

    The draft model reads each level of the tree in one pass and keeps its own cache from step to step: the accepted
    path's rows stay, so it reads no token twice. When the target samples, children are drawn without replacement from
    the draft's distribution, warped by the target's temperature, top-k and top-p, and the tree carries it as `q`; when
    the target is greedy they are the draft's most likely tokens.

    Args:
        model: the draft model; or an `NGramStore` over the target's vocabulary.
        widths: children of each node, level by level; `(1,) * n` is a chain. Default: five levels of one.
        shape: the tree instead of `widths`: the parent of each node, such as those of `static_tree.best_tree`. Default
            None.
        confidence: a node whose most likely next token has a lower draft probability gets no children, 0 to 1.
            Default 0: every node gets them.
        temperature: of the draft when sampling, above 0. Default None: the target's.

    Attributes:
        calls: passes of the draft in the last run.

    Raises:
        IntaglioError: no widths, a width below 1, a shape that is no tree, a confidence outside 0 to 1, or a
            temperature that is not above 0.
    """

    needs_hidden = False

    def __init__(
        self,
        model: Any,
        widths: Sequence[int] = (1, 1, 1, 1, 1),
        *,
        shape: Sequence[int] | None = None,
        confidence: float = 0.0,
        temperature: float | None = None,
    ) -> None:
        if not 0 <= confidence <= 1:
            raise IntaglioError(f"confidence is {confidence}; 0 to 1 is accepted")
        if temperature is not None and not temperature > 0:
            raise IntaglioError(f"temperature is {temperature}; it must be above 0")
        self.model = model
        self.tree = StaticTree.from_widths(widths) if shape is None else StaticTree(shape)
        self.confidence = confidence
        self.temperature = temperature
        self.calls = DraftStats()

    def start(self, run: DecodingRun) -> Session:
        """Start a run: the draft model reads the prompts; see `Drafter.start`.

        Raises:
            IntaglioError: another vocabulary than the target's, or a context that is too short.
        """
        draft = open_draft(self.model, run)
        self.calls = draft.calls
        temperature = self.temperature if run.sampling else None
        return DynamicTreeSession(draft, draft_probs_fn(run, temperature), lambda row, tree: self._grow(run, tree))

    def _grow(self, run: DecodingRun, tree: PartialTree) -> Growth:
        """Level by level, give every node as many children as the static tree has there."""
        level = [(0, 0)]  # nodes of the partial tree, and of the static tree
        while tree.depths[-1] < tree.room:
            level = [(node, static) for node, static in level if self.tree.children[static]]
            if not level:
                return
            probs_NV = yield [node for node, _ in level]
            confident = (probs_NV.amax(-1) >= self.confidence).tolist()
            before, level = level, []
            for (node, static), probs_V, is_confident in zip(before, probs_NV, confident, strict=True):
                if not is_confident:
                    continue
                below = self.tree.children[static]
                if run.sampling:
                    most = min(len(below), int((probs_V > 0).sum()))
                    tokens = torch.multinomial(probs_V, most, generator=run.generator)
                    tree.q[node] = probs_V
                else:
                    tokens = _most_likely(probs_V, min(len(below), len(probs_V)))
                level += [(tree.add(node, token), child) for token, child in zip(tokens.tolist(), below, strict=False)]


def _most_likely(probs_V: Tensor, count: int) -> Tensor:
    """Return the most likely tokens, of equals the smaller id first: `topk` leaves their order open."""
    least = probs_V.topk(count).values[-1]
    candidates_C = (probs_V >= least).nonzero()[:, 0]
    return candidates_C[probs_V[candidates_C].sort(descending=True, stable=True).indices[:count]]


def open_draft(draft: Any, run: DecodingRun) -> Draft:
    """Return the `Draft` of a causal language model or an `NGramStore` for a run.

    Raises:
        IntaglioError: another vocabulary than the target's, or a model's context that is too short.
    """
    if isinstance(draft, NGramStore):
        draft.check(run.model)
        return TableDraft(draft, run)
    if not run.branches:
        raise IntaglioError(
            f"{run.model.config.model_type} cannot read trees that branch, as a draft model grows them; use a drafter "
            "without a model, such as aded or prompt lookup"
        )
    check_draft_model(draft, run)
    return CachedModelDraft(draft, run)
