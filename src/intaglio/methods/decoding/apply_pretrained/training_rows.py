"""Rows and batches of the trained add-ons: pairs of sequences, and texts with a class for each prefix."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.data.json_lines import json_lines
from intaglio.errors import IntaglioError, shorten
from intaglio.methods.decoding.apply_pretrained.prefix_classifier import remaining_classes
from intaglio.methods.decoding.apply_pretrained.seq2seq import corrupt
from intaglio.trainer.causal_lm import IGNORED
from intaglio.trainer.dataset import as_ids
from intaglio.trainer.instruction_data import prompt_and_answer, tokenize_pair
from intaglio.trainer.protocols import Batch, Example
from intaglio.trainer.rng import KeyedRNG, generator


def sequence_pairs(checkpoint: Checkpoint, examples: Iterable[Example], max_target: int) -> Iterator[Example]:
    """Yield `source` and `target`, int64 [S] and [L], of pairs: texts, or `source_ids` and `target_ids`.

    Texts get the tokenizer's special tokens.

    Raises:
        IntaglioError: no tokenizer, no pair, or one whose source or target is empty or too long.
    """
    for number, example in enumerate(examples):
        what = f"example {number} of the training data"
        if "source_ids" in example and "target_ids" in example:
            pair = (example["source_ids"], example["target_ids"])
        else:
            if checkpoint.tokenizer is None:
                raise IntaglioError("the checkpoint has no tokenizer; give source_ids and target_ids")
            texts = prompt_and_answer(example, what)
            pair = tuple(checkpoint.tokenizer(text, verbose=False)["input_ids"] for text in texts)
        source_S, target_L = (as_ids(ids, what) for ids in pair)
        for name, ids, most in (("source", source_S, checkpoint.context), ("target", target_L, max_target)):
            if not 1 <= len(ids) <= most:
                raise IntaglioError(f"{what}: its {name} has {len(ids)} tokens; 1 to {most} are accepted")
        # `input_ids` is what the loop counts.
        yield {**example, "input_ids": target_L, "source": source_S, "target": target_L}


def sequence_batch(
    rows: Sequence[Example], rng: KeyedRNG, vocabulary: int, mask_id: int | None, mask_share: float
) -> Batch:
    """Return the batch of `sundae_loss`; each row has a corruption rate and draws of its own."""
    drafts = []
    for row in rows:
        draws = rng(row, "sundae")
        rate = float(torch.rand((), generator=draws))
        drafts.append(corrupt(row["target"], rate, vocabulary, mask_id, draws, mask_share))
    key = [f"{row['id']}/{row.get('epoch', 0)}" for row in rows]
    seed = int(torch.randint(1 << 62, (), generator=generator(rng.seed, "unroll", *key)))
    return {
        "source": _padded([row["source"] for row in rows], 0),
        "source_mask": _padded([torch.ones_like(row["source"]) for row in rows], 0),
        "target": _padded([row["target"] for row in rows], IGNORED),
        "draft": _padded(drafts, 0),
        "seed": torch.tensor(seed),
        "weight": sum(len(row["target"]) for row in rows),
    }


def labelled_texts(path: str) -> list[Example]:
    """Return the texts of a file with one JSON object a line: `prompt`, `answer` and `label`, 0 or 1.

    Raises:
        IntaglioError: the file cannot be read, or a line is malformed (it is named).
    """
    result = []
    for place, value in json_lines(path, "labels", "prompt, answer and label, 0 or 1,"):
        if not isinstance(value, dict) or value.get("label") not in (0, 1):
            raise IntaglioError(f"{place} is {shorten(json.dumps(value))}; it needs prompt, answer and label, 0 or 1")
        result.append(value)
    return result


def labelled_rows(checkpoint: Checkpoint, examples: Iterable[Example], length: int) -> Iterator[Example]:
    """Yield `input_ids` and `classes` of labelled texts: the label at each token of the answer, -100 in the prompt."""
    for number, example in enumerate(examples):
        prompt, answer, stop = tokenize_pair(checkpoint, example, number, length, chat=False)
        ids_T = torch.tensor([*prompt, *answer, *stop])
        class_T = torch.full_like(ids_T, int(example["label"]))
        class_T[: len(prompt)] = IGNORED
        yield {"input_ids": ids_T, "classes": class_T}


def length_rows(examples: Iterable[Example], length: int, classes: int, end_tokens: Sequence[int]) -> Iterator[Example]:
    """Yield `input_ids` and `classes`, the number of tokens that remain after each prefix, for texts cut to `length`.

    A text of the model's own (`labels` of -100 in its prompt) is complete where it ends with an end token; every other
    text is.
    """
    for example in examples:
        ids_T = as_ids(example["input_ids"], "a text")
        labels = example.get("labels")
        complete = labels is None or int(ids_T[-1]) in end_tokens
        if labels is None and int(ids_T[-1]) not in end_tokens and end_tokens:
            ids_T = torch.cat([ids_T, torch.tensor([end_tokens[0]])])
        class_T = remaining_classes(len(ids_T), complete, classes)
        if labels is not None:
            class_T = torch.where(torch.as_tensor(labels) == IGNORED, IGNORED, class_T)
        if len(ids_T) > 1:
            yield {"input_ids": ids_T[:length], "classes": class_T[:length]}


def class_batch(rows: Sequence[Any]) -> Batch:
    """Return `input_ids` and `target`, the class of each prefix, padded on the right."""
    class_BT = _padded([row["classes"] for row in rows], IGNORED)
    weight = int((class_BT[:, 1:] != IGNORED).sum())
    return {"input_ids": _padded([row["input_ids"] for row in rows], 0), "target": class_BT, "weight": weight}


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
