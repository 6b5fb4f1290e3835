"""Drafters that arms of `Replay` use: functions `(context, **settings) -> Drafter`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.designs.replay import Context, Text, continuations
from intaglio.evidence.testbeds.draft_model import DraftModelBed
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.methods.decoding.aded import ADED
from intaglio.methods.decoding.dyspec import AcceptanceTable, DySpec
from intaglio.speculative.drafters.draft_model import DraftModel
from intaglio.speculative.drafters.prompt_lookup import PromptLookup
from intaglio.speculative.drafters.rank_statistics import acceptance_by_rank, draft_ranks
from intaglio.speculative.static_tree import StaticTree, best_tree, widths_within

NODES = 15
"""Drafted tokens that an arm may verify in a pass, where its settings have no other number."""
RANKS = 32
"""Candidates of a draft model that are counted; no node of a fitted tree has more children."""
FITTED_UNITS = 8
"""Units of the training set that fixed trees and acceptance tables are fitted on."""
Tree = Literal["best", "widths", "chain"]


def prompt_lookup(context: Context, nodes: int = NODES, candidates: int = 1, length: int = NODES) -> PromptLookup:
    """Return prompt lookup: up to `candidates` continuations of the longest match, merged into a tree."""
    return PromptLookup(nodes=nodes, candidates=candidates, length=length)


def aded(context: Context, nodes: int = NODES, **fields: Any) -> Any:
    """Return ADED with every pass's nodes used; its table is counted in the test bed's training texts."""
    table = _table(context.bed)
    # Without costs: what is unlikely is verified too, as prompt lookup does.
    return ADED(nodes=nodes, draft_cost=0.0, token_cost=0.0, **fields).model_copy(
        update={"corpus": table, "tokenizer": context.target.tokenizer}
    )


@lru_cache(maxsize=2)
def _table(bed: Any) -> Any:
    target = bed.load()
    return ADED(corpus=bed.corpus(), tokenizer=target.tokenizer).table(target.model)


def fixed_tree(context: Context, nodes: int = NODES, tree: Tree = "best", draft: Any = None) -> DraftModel:
    """Return a draft model with the fixed tree that takes the fewest passes on the training prompts.

    `tree` is `chain`, `widths` (equally many children at every node of a level) or `best`: of these and Sequoia's trees
    of every depth. `draft` is SmolLM2's test bed by default; a small model of bytes drafts for itself.
    """
    draft = draft or _draft_bed(context.bed)
    return DraftModel(
        draft.load().model, shape=fitted_tree(context.bed, draft, nodes, tree, context.design.new).parents
    )


def dyspec(context: Context, nodes: int = NODES, fitted: bool = False, draft: Any = None, **fields: Any) -> Any:
    """Return DySpec; `fitted` counts its chances of acceptance on the prompts that fixed trees are fitted on."""
    draft = draft or _draft_bed(context.bed)
    if fitted:
        fields["acceptance"] = _acceptance(context.bed, draft, nodes, context.design.new)
    return DySpec(draft=draft.load().model, budget=nodes, **fields)


def _draft_bed(bed: Any) -> Any:
    return bed if isinstance(bed, SourceCode) else DraftModelBed()


@lru_cache(maxsize=16)
def fitted_tree(bed: Any, draft: Any, nodes: int, tree: Tree, new: int) -> StaticTree:
    """Return the fixed tree with the fewest passes on the training prompts, counted exactly."""
    if tree == "chain":
        return StaticTree.from_widths((1,) * nodes)
    ranks = _ranks(bed, draft, new)
    trees = [StaticTree.from_widths(widths) for widths in widths_within(nodes)]
    if tree == "best":
        chances = tuple(acceptance_by_rank(ranks, RANKS))
        trees = [*(best_tree(chances, nodes, depth) for depth in (*range(2, 17), nodes)), *trees]
    return min(trees, key=lambda tree: sum(tree.replay(of_text) for of_text in ranks))


@lru_cache(maxsize=4)
def _ranks(bed: Any, draft: Any, new: int) -> list[list[int]]:
    return [draft_ranks(draft.load().model, text) for text in _training_texts(bed, new)]


@lru_cache(maxsize=4)
def _acceptance(bed: Any, draft: Any, nodes: int, new: int) -> AcceptanceTable:
    decoder = DySpec(draft=draft.load().model, budget=nodes)
    return decoder.fit_acceptance(bed.load().model, _training_texts(bed, new))


@lru_cache(maxsize=4)
def _training_texts(bed: Any, new: int) -> list[tuple[list[int], int]]:
    """Return the target's greedy texts after training prompts, each with the first position to draft."""
    target: Checkpoint = bed.load()
    units = (tuple(tuple(p.ids) for p in bed.source("train", index)) for index in range(FITTED_UNITS))
    texts: list[Text] = [text for prompts in units for text in continuations(target, prompts, new, False)]
    # The first new token is the prefill's: no tree is tried for it.
    return [([*text.prompt, *text.new], len(text.prompt) + 1) for text in texts]
