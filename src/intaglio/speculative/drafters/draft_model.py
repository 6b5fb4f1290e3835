"""A smaller model that drafts: a chain or a fixed tree of its own likely continuations.

Sources: Leviathan et al., Fast Inference from Transformers via Speculative Decoding, ICML 2023 (a chain); Miao et al.,
SpecInfer, ASPLOS 2024 (a tree of fixed widths); Chen et al., Sequoia, NeurIPS 2024 (a tree of the best shape, which
`shapes.best` finds).

Dimension letters: N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from intaglio.errors import IntaglioError
from intaglio.speculative.drafters.dynamic_tree import (
    Calls,
    Draft,
    Growing,
    GrowingSession,
    Growth,
    ModelDraft,
    TableDraft,
    check_draft_model,
    draft_law,
)
from intaglio.speculative.drafters.ngrams import NGramStore
from intaglio.speculative.drafters.static_tree import Shape, by_widths
from intaglio.speculative.protocols import Run, Session


class DraftModel:
    """Drafts with a smaller causal language model that has the target's vocabulary.

    The draft model reads each level of the tree in one pass and keeps its own cache from step to step: the accepted
    path's rows stay, so it reads no token twice. When the target samples, children are drawn without replacement from
    the draft's distribution, warped by the target's temperature, top-k and top-p, and the tree carries it as `q`; when
    the target is greedy they are the draft's most likely tokens.

    Args:
        model: the draft model; or an `NGramStore` over the target's vocabulary.
        widths: children of each node, level by level; `(1,) * n` is a chain. Default five levels of one.
        shape: the tree in the place of `widths`: the parent of each node, such as `shapes.best` gives. Default None.
        confidence: a node whose most likely next token has a lower draft probability gets no children, 0 to 1.
            Default 0: every node gets them.
        temperature: of the draft when sampling, above 0. Default None: the target's.

    Attributes:
        calls: what the draft did in the last run.

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
        self.shape = by_widths(widths) if shape is None else Shape(shape)
        self.confidence = confidence
        self.temperature = temperature
        self.calls = Calls()

    def start(self, run: Run) -> Session:
        """Begin a run: the draft model reads the prompts; see `Drafter.start`.

        Raises:
            IntaglioError: another vocabulary than the target's, or a context that is too short.
        """
        draft = open_draft(self.model, run)
        self.calls = draft.calls
        temperature = self.temperature if run.sampling else None
        return GrowingSession(draft, draft_law(run, temperature), lambda row, tree: self._grow(run, tree))

    def _grow(self, run: Run, tree: Growing) -> Growth:
        """Level by level, every node as many children as the shape has there."""
        level = [(0, 0)]  # nodes of the tree, and of the shape
        while tree.depths[-1] < tree.room:
            level = [(node, place) for node, place in level if self.shape.children[place]]
            if not level:
                return
            laws_NV = yield [node for node, _ in level]
            sure = (laws_NV.amax(-1) >= self.confidence).tolist()
            before, level = level, []
            for (node, place), law_V, is_sure in zip(before, laws_NV, sure, strict=True):
                if not is_sure:
                    continue
                below = self.shape.children[place]
                if run.sampling:
                    most = min(len(below), int((law_V > 0).sum()))
                    tokens = torch.multinomial(law_V, most, generator=run.generator)
                    tree.q[node] = law_V
                else:
                    tokens = law_V.topk(min(len(below), len(law_V))).indices
                level += [(tree.add(node, token), child) for token, child in zip(tokens.tolist(), below, strict=False)]


def open_draft(draft: Any, run: Run) -> Draft:
    """A model or a table at work in a run.

    Args:
        draft: a causal language model with the target's vocabulary, or an `NGramStore`.
        run: the run.

    Raises:
        IntaglioError: another vocabulary than the target's, or a model's context that is too short.
    """
    if isinstance(draft, NGramStore):
        draft.check(run.model)
        return TableDraft(draft, run)
    check_draft_model(draft, run)
    return ModelDraft(draft, run)
