"""Training rows: contexts with the tokens to predict after them, from texts or from questions with passages.

A row is `context`, int64 [S], the passages one after the other; `passages`, int64, their lengths; `before` and `after`,
the tokens around them; `answer` and `labels`, int64 [A]. A row of plain text has `document` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.data.json_lines import json_lines
from intaglio.errors import IntaglioError, shorten
from intaglio.trainer.causal_lm import documents
from intaglio.trainer.dataset import as_ids
from intaglio.trainer.protocols import Example

Order = Literal["question_first", "context_first"]
PLACE = "\ue000passages\ue000"
"""Stands for the passages while a prompt is rendered; private-use characters, so that no text has it."""
SEPARATOR = "\n\n"
"""After each passage, of which it is a part."""


def bos_ids(checkpoint: Checkpoint) -> Tensor:
    """Return the token that a plain prompt begins with, if the tokenizer has one, int64 [0 or 1]."""
    bos = getattr(checkpoint.tokenizer, "bos_token_id", None)
    return torch.tensor([] if bos is None else [bos], dtype=torch.int64)


def text_ids(checkpoint: Checkpoint, text: str) -> Tensor:
    """Return the token ids of a text without special tokens, int64.

    Raises:
        IntaglioError: the checkpoint has no tokenizer.
    """
    if checkpoint.tokenizer is None:
        raise IntaglioError("the checkpoint has no tokenizer, which questions and passages need")
    ids = checkpoint.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def passage_ids(checkpoint: Checkpoint, text: str) -> Tensor:
    """Return the token ids of a passage with the separator after it, int64."""
    return text_ids(checkpoint, f"{text.strip()}{SEPARATOR}")


def question_parts(checkpoint: Checkpoint, question: str, order: Order) -> tuple[Tensor, Tensor]:
    """Return the token ids before and after a question's passages, in the chat template if the tokenizer has one."""
    asked, tokenizer = f"Question: {question}", checkpoint.tokenizer
    content = f"{asked}{SEPARATOR}{PLACE}" if order == "question_first" else f"{PLACE}{asked}{SEPARATOR}"
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": content}]
        rendered = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        begin = torch.tensor([], dtype=torch.int64)
    else:
        rendered, begin = f"{content}Answer:", bos_ids(checkpoint)
    before, _, after = rendered.partition(PLACE)
    return torch.cat([begin, text_ids(checkpoint, before)]), text_ids(checkpoint, after)


def read_questions(path: str) -> list[Example]:
    """Return the lines of a file with one JSON object each: `question`, `answer` and `passages`, a list of texts.

    Raises:
        IntaglioError: the file cannot be read or is empty, or a line is malformed (it is named).
    """
    rows = []
    for place, value in json_lines(path, "questions", "question, answer and passages"):
        passages = value.get("passages") if isinstance(value, Mapping) else None
        texts = [*passages] if isinstance(passages, list) else [None]
        if isinstance(value, Mapping):
            texts += [value.get("question"), value.get("answer")]
        if not texts[:-2] or not all(isinstance(text, str) and text.strip() for text in texts):
            raise IntaglioError(
                f"{place} is {shorten(repr(value))}; an object with question, answer and passages, a list of texts, is "
                "accepted"
            )
        rows.append({name: value[name] for name in ("question", "answer", "passages")})
    return rows


def question_rows(checkpoint: Checkpoint, examples: Iterable[Example], order: Order) -> Iterator[Example]:
    """Yield rows of questions with passages, as texts or as ids (`passage_ids`, `answer_ids` and so on).

    Of ids, `passage_ids` is a list of rows, `before_ids` and `after_ids` stand around them (default: none), and
    `labels` are those of `answer_ids` (default: all are predicted).
    """
    for number, example in enumerate(examples):
        what = f"example {number} of the training data"
        if "passage_ids" in example and "answer_ids" in example:
            passages = [as_ids(ids, what) for ids in example["passage_ids"]]
            before, after = (
                torch.as_tensor(example.get(name, []), dtype=torch.int64) for name in ("before_ids", "after_ids")
            )
            answer = as_ids(example["answer_ids"], what)
        elif {"question", "answer", "passages"} <= example.keys():
            passages = [passage_ids(checkpoint, text) for text in example["passages"]]
            before, after = question_parts(checkpoint, example["question"], order)
            end = getattr(checkpoint.tokenizer, "eos_token_id", None)
            answer = text_ids(checkpoint, f" {example['answer']}")
            answer = torch.cat([answer, torch.tensor([] if end is None else [end], dtype=torch.int64)])
        else:
            raise IntaglioError(f"{what} is no question; it needs question, answer and passages")
        labels = answer if example.get("labels") is None else as_ids(example["labels"], what)
        yield {
            "context": torch.cat(passages),
            "passages": torch.tensor([len(ids) for ids in passages]),
            "before": before,
            "after": after,
            "answer": answer,
            "labels": labels,
        }


def document_rows(checkpoint: Checkpoint, examples: Iterable[Example], length: int, least: int) -> Iterator[Example]:
    """Yield pieces of texts, each of at most `length` and at least `least` tokens, without a first BOS."""
    begin = bos_ids(checkpoint)
    for example in documents(examples, checkpoint.vocabulary):
        ids_T = example["input_ids"]
        if len(begin) and int(ids_T[0]) == int(begin[0]):
            ids_T = ids_T[1:]
        for piece_T in ids_T.split(length) if len(ids_T) else ():
            if len(piece_T) >= least:
                yield {"document": piece_T}


def passages_of(row: Example) -> Sequence[Tensor]:
    """Return the passages of a question's row."""
    lengths: list[int] = row["passages"].tolist()
    parts: Any = row["context"].split(lengths)
    return parts
