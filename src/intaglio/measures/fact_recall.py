"""Recall of facts in both directions: greedy answers to prompts that name the subject, or the object.

Dimension letters: B rows, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from intaglio.checkpoint import Checkpoint
from intaglio.data.facts import Fact
from intaglio.errors import IntaglioError
from intaglio.measures.generated_text import greedy_answers

NEW_TOKENS = 24
"""Tokens in which the answer must occur."""


@dataclass(frozen=True)
class Recall:
    """Answers to all questions, forward then reverse; an answer is right where it contains the expected text."""

    prompts: tuple[str, ...]
    expected: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def right(self) -> list[bool]:
        """Whether each answer is right, whatever the case of its letters."""
        return [want.casefold() in text.casefold() for want, text in zip(self.expected, self.answers, strict=True)]

    @property
    def shares(self) -> dict[str, float]:
        """Percentage of right answers: `forward` and `reverse`."""
        right, half = self.right, len(self.right) // 2
        return {"forward": 100 * fmean(right[:half]), "reverse": 100 * fmean(right[half:])}


@torch.no_grad()
def fact_recall(
    checkpoint: Checkpoint, facts: Sequence[Fact], *, batch_size: int = 16, max_new_tokens: int = NEW_TOKENS
) -> Recall:
    """Ask a causal model for the object and for the subject of each fact with `asked`.

    Raises:
        IntaglioError: there is no tokenizer, or a question does not fit into the context.
    """
    tokenizer: Any = checkpoint.tokenizer
    if tokenizer is None:
        raise IntaglioError("the checkpoint has no tokenizer, so it cannot be asked for facts")
    facts = [fact for fact in facts if fact.asked]
    prompts = [fact.forward for fact in facts] + [fact.reverse for fact in facts]
    expected = [fact.object for fact in facts] + [fact.subject for fact in facts]
    ids = tokenizer(prompts, verbose=False)["input_ids"]
    longest = max(map(len, ids))
    if longest + max_new_tokens > checkpoint.context:
        raise IntaglioError(
            f"a question of {longest} tokens leaves no room for an answer of {max_new_tokens} in the context of"
            f" {checkpoint.context}"
        )
    # Rows of a batch are as long as each other: padding on the left would shift their positions.
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(ids):
        groups.setdefault(len(row), []).append(index)
    answers = [""] * len(ids)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            chosen = group[start : start + batch_size]
            ids_BP = torch.tensor([ids[index] for index in chosen], device=checkpoint.device)
            texts = greedy_answers(checkpoint, ids_BP, max_new_tokens)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text
    return Recall(tuple(prompts), tuple(expected), tuple(answers))
