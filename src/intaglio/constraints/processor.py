"""Constraints in stock `generate`: a logits processor, and the end of an output.

Dimension letters: B rows, L tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor

from intaglio.constraints.base import Constraint, Prefix, dead_end
from intaglio.constraints.vocabulary import Vocabulary
from intaglio.errors import IntaglioError


@dataclass
class _Node:
    """A prefix and its continuations that were visited."""

    prefix: Prefix
    children: dict[int, _Node] = field(default_factory=dict)


class ConstraintProcessor(LogitsProcessor):
    """Logits processor that sets the scores of tokens that a constraint rejects to minus infinity.

        processor = ConstraintProcessor(constraint, vocabulary, prompt_length=ids.shape[1])
        model.generate(ids, logits_processor=[processor])

    The state follows from the tokens after the prompt, so that one processor serves all rows, and all nodes of a draft
    tree: a speculative decoder stays lossless against the constrained model. Where a mask does not decide (a
    `Predicate`), greedy decoding checks tokens from the best one down; sampling checks the whole vocabulary, as a mask
    must (AWRS checks a few tokens instead).

    Args:
        constraint: of the new tokens' text.
        vocabulary: of the model.
        prompt_length: tokens of a row that are prompt or padding.
        greedy: whether only the best token's score is needed. Default False.

    Attributes:
        checks: tokens that were checked beyond masks.
    """

    def __init__(
        self, constraint: Constraint, vocabulary: Vocabulary, prompt_length: int, greedy: bool = False
    ) -> None:
        self.vocabulary = vocabulary
        self.prompt_length = prompt_length
        self.greedy = greedy
        self.checks = 0
        self._root = _Node(Prefix.empty(constraint, vocabulary))

    def prefix(self, tokens: Sequence[int]) -> Prefix:
        """Return the output after some new tokens, which the constraint allows; what follows an end is ignored."""
        node = self._root
        for token in tokens:
            if node.prefix.ended:
                break
            if token not in node.children:
                node.children[token] = _Node(node.prefix.extended(token))
            node = node.children[token]
        return node.prefix

    def allowed_nodes(self, ids: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> list[bool]:
        """Return for each node of a draft tree whether the constraint allows its path.

        Args:
            ids: prompt and new tokens, the root's included.
            tokens: token of each node, the root first.
            parents: index of each node's parent, which comes before it.
        """
        prefixes: list[Prefix | None] = [self.prefix(ids[self.prompt_length :])]
        for token, parent in zip(tokens[1:], parents[1:], strict=True):
            before = prefixes[parent]
            allowed = before is not None and self.allows(before, token)
            prefixes.append(before.extended(token) if before is not None and allowed else None)
        return [prefix is not None for prefix in prefixes]

    def allows(self, prefix: Prefix, token: int) -> bool:
        """Return whether a token may follow a prefix."""
        return not prefix.ended and bool(prefix.mask()[token]) and (prefix.state.exact or prefix.allows(token))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores [B, V] with rejected tokens at minus infinity.

        Raises:
            IntaglioError: no token may follow a prefix.
        """
        return torch.stack(
            [self._row(ids_L.tolist(), scores_V) for ids_L, scores_V in zip(input_ids, scores, strict=True)]
        )

    def _row(self, ids: list[int], scores_V: Tensor) -> Tensor:
        prefix = self.prefix(ids[self.prompt_length :])
        if prefix.ended:
            return scores_V
        mask_V = torch.from_numpy(prefix.mask())
        if len(mask_V) < len(scores_V):  # a head with more rows than the model has tokens
            mask_V = torch.nn.functional.pad(mask_V, (0, len(scores_V) - len(mask_V)))
        scores_V = scores_V.masked_fill(~mask_V.to(scores_V.device), float("-inf"))
        if not prefix.state.exact:
            scores_V = self._checked(prefix, scores_V)
        if bool(torch.isinf(scores_V).all()):
            raise IntaglioError(dead_end(prefix))
        return scores_V

    def _checked(self, prefix: Prefix, scores_V: Tensor) -> Tensor:
        """Check tokens one by one, the best first, until the scores that are needed are known."""
        order = scores_V.argsort(descending=True, stable=True).tolist()
        rejected = []
        for token in order[: int((~torch.isinf(scores_V)).sum())]:
            self.checks += 1
            if not prefix.allows(token):
                rejected.append(token)
            elif self.greedy:
                break
        scores_V = scores_V.clone()
        scores_V[rejected] = float("-inf")
        return scores_V


def check_output(processor: ConstraintProcessor, tokens: Sequence[int]) -> str:
    """Return the text of a finished output.

    Raises:
        IntaglioError: it stopped before it was complete, for lack of tokens.
    """
    prefix = processor.prefix(tokens)
    if not (prefix.ended or prefix.complete()):
        raise IntaglioError(
            f"the output is not complete after max_new_tokens = {len(tokens)} tokens: it ends in {prefix.shown}; give "
            "it more tokens or a narrower constraint"
        )
    return prefix.text
