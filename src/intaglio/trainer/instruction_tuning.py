"""Instruction tuning: next-token prediction of the answers of pairs; the objective `InstructionTuning`.

Dimension letters: T tokens of a pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from intaglio.checkpoint import Checkpoint
from intaglio.trainer.causal_lm import IGNORED, CausalLM, check_causal, filled, row_length
from intaglio.trainer.instruction_data import tokenize_pair
from intaglio.trainer.protocols import Example
from intaglio.trainer.rng import KeyedRNG


def as_document(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """Return `input_ids` and `labels`, int64 [T]: no token of the prompt is predicted."""
    ids_T = torch.tensor([*prompt, *answer])
    labels_T = ids_T.clone()
    labels_T[: len(prompt)] = IGNORED
    return {"input_ids": ids_T, "labels": labels_T}


def pair_document(checkpoint: Checkpoint, pair: Example, number: int, length: int, *, chat: bool) -> Example:
    """Tokenise a pair, cut to `length` tokens, and return its document."""
    prompt, answer, stop = tokenize_pair(checkpoint, pair, number, length, chat=chat)
    return as_document(prompt, [*answer, *stop])


@dataclass(frozen=True)
class InstructionTuning(CausalLM):
    """Supervised fine-tuning on pairs, `-mean_t log p(answer_t | prompt, answer_1..answer_{t-1})`, the end included.

    Args:
        length: tokens of a row. Default: the model's context, at most 1,024.
        pack: whether rows are filled with several pairs, which do not see each other; a pair is never split between
            rows. Default True.
        chat: whether prompts are put into the tokenizer's chat template, if it has one. Default True.
    """

    chat: bool = True

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Turn the pairs into rows."""
        length = row_length(checkpoint, self.length)
        check_causal(checkpoint, packing=self.pack)
        rows = (pair_document(checkpoint, pair, number, length, chat=self.chat) for number, pair in enumerate(examples))
        return filled(rows, length) if self.pack else rows
