"""Candidate tokens of draft heads: the most likely ones, or ones drawn from the heads' distribution.

Dimension letters: K levels, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from intaglio.speculative.heads.lm_head import DraftVocabulary
from intaglio.speculative.static_tree import StaticTree
from intaglio.speculative.tree import TokenTree, root_only


@dataclass(frozen=True, eq=False)
class CandidateSampler:
    """Takes candidates from a draft's logits.

    Args:
        to_probs: from logits [..., V] to the distribution drafted from.
        drawn: whether candidates are drawn, without replacement; else they are the most likely.
        generator: source of the draws; None for torch's global generator.
        words: the tokens that may be guessed, over which the logits are. Default: all.
    """

    to_probs: Callable[[Tensor], Tensor]
    drawn: bool
    generator: torch.Generator | None = None
    words: DraftVocabulary = field(default_factory=DraftVocabulary)

    def pick(self, logits_RK: Tensor, counts: Sequence[int]) -> tuple[list[list[int]], list[Tensor | None]]:
        """Return at most `counts[r]` candidates of each row, and the distributions they were drawn from.

        The logits cover the draft vocabulary, the distributions the target's.
        """
        if not self.drawn:
            most = min(max(counts), logits_RK.shape[-1])
            best = self.words.tokens(logits_RK.topk(most, -1).indices).tolist()
            return [row[:count] for row, count in zip(best, counts, strict=True)], [None] * len(counts)
        probs_RV = self.to_probs(self.words.wide(logits_RK))
        candidates = [
            torch.multinomial(probs_V, min(count, int((probs_V > 0).sum())), generator=self.generator).tolist()
            for probs_V, count in zip(probs_RV, counts, strict=True)
        ]
        return candidates, list(probs_RV)

    def cartesian(self, root: int, logits_KV: Tensor, tree: StaticTree, room: int) -> TokenTree:
        """Return a tree of at most `room` levels whose candidates depend on the level alone, so that cousins repeat.

        Under sampling the candidates of a level are drawn once and shared by all nodes above: they are independent of
        how a node was reached, which is all that the rule of `verify.sampling` needs.
        """
        levels = min(tree.depth, room, len(logits_KV))
        if levels < 1:
            return root_only(root)
        tree = tree.truncate(levels)
        candidates, probs = self.pick(logits_KV[:levels], tree.widths)
        return tree.fill(root, lambda node: candidates[tree.depths[node]], lambda node: probs[tree.depths[node]])
