"""Tokenised samples, truncated as in training, which selectors score: their batches and scored positions.

Dimension letters: B samples, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.trainer.causal_lm import row_length
from intaglio.trainer.dataset import as_ids
from intaglio.trainer.instruction_data import NAMES, prompt_and_answer, tokenize_pair
from intaglio.trainer.protocols import Example

Scope = Literal["answer", "prompt", "both"]

ELEMENTS = 1 << 22
"""Limit of elements in a float32 table of predictions at a time."""


@dataclass(frozen=True)
class Sample:
    """A tokenised example.

    A plain text has an empty `prompt` and itself as `instruction`. `answer` ends with the end token. `tokens` is the
    length before truncation.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    tokens: int
    instruction: str
    words: str


def read_samples(
    examples: Sequence[Example], checkpoint: Checkpoint, length: int | None, *, chat: bool
) -> list[Sample]:
    """Tokenise examples as for training."""
    max_length = row_length(checkpoint, length)
    return [_read(checkpoint, example, number, max_length, chat) for number, example in enumerate(examples)]


def _read(checkpoint: Checkpoint, example: Example, number: int, max_length: int, chat: bool) -> Sample:
    label = f"example {number} of the training data"
    if any(question in example and reply in example for question, reply in NAMES):
        question, reply = prompt_and_answer(example, label)
        prompt_ids, answer_ids, stop = tokenize_pair(
            checkpoint, example, number, row_length(checkpoint, None), chat=chat
        )
        target_ids = [*answer_ids, *stop]
        kept = target_ids[: max(max_length - len(prompt_ids), max_length // 2)]
        prompt = prompt_ids[max(0, len(prompt_ids) + len(kept) - max_length) :]
        return Sample(tuple(prompt), tuple(kept), len(prompt_ids) + len(target_ids), question, f"{question}\n{reply}")
    if "input_ids" not in example:
        known = ", ".join(sorted(key for key in example if key != "id")) or "nothing"
        raise IntaglioError(f"{label} is neither a pair nor a text; its fields: {known}")
    ids = as_ids(example["input_ids"], label)
    checkpoint.check_ids(ids[:max_length])
    text = example.get("text")
    if text is None and checkpoint.tokenizer is None:
        raise IntaglioError(f"{label} has only token ids, and there is no tokenizer to decode them")
    if text is None:
        text = checkpoint.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
    return Sample((), tuple(ids[:max_length].tolist()), len(ids), text, text)


def padded_batch(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Return `input_ids` [B, L] of samples, padded on the right, and `attention_mask` where there is padding."""
    ids = [torch.tensor([*sample.prompt, *sample.answer]) for sample in samples]
    ids_BL = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask_BL = torch.arange(ids_BL.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
    return {"input_ids": ids_BL} | ({} if bool(mask_BL.all()) else {"attention_mask": mask_BL.long()})


def positions(sample: Sample, scope: Scope) -> range:
    """Return the positions of a sample at which predictions are scored."""
    prompt, end = len(sample.prompt), len(sample.prompt) + len(sample.answer)
    if not prompt:
        return range(0, end - 1)
    if scope == "prompt":
        return range(0, prompt)
    return range(prompt - 1 if scope == "answer" else 0, end - 1)
