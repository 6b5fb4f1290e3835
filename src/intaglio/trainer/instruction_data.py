"""Instruction pairs: a prompt and the answer to learn, from a file or from a user's own examples."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from intaglio.checkpoint import Checkpoint
from intaglio.data.docstrings import pairs
from intaglio.data.json_lines import json_lines
from intaglio.data.python_source import source_files
from intaglio.errors import IntaglioError, shorten
from intaglio.trainer.dataset import token_ids
from intaglio.trainer.protocols import Example

NAMES = (("prompt", "answer"), ("prompt", "completion"), ("instruction", "output"))
"""Accepted names of prompt and answer; an `input` is appended to its instruction."""

DOCSTRINGS = "docstrings"
"""The bundled pairs, by name."""


def docstring_pairs() -> list[Example]:
    """Return pairs from the running interpreter's standard library, in the order of their hashes.

    The prompt asks for a function that does what a docstring's summary says, the answer is its code. Answers are long
    (median about 400 characters), so most can be masked in part.
    """
    by_id = {pair.id: pair for pair in pairs(source_files(), "code")}
    return [
        {
            "prompt": f"Write the Python function {pair.name} of the module {pair.module}. {pair.query}",
            "answer": pair.document,
        }
        for _, pair in sorted(by_id.items())
    ]


def train_eval_split(examples: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Split off a share of the examples, at least one, for evaluation: those with the lowest content hashes."""
    count = max(1, round(share * len(examples)))
    if count >= len(examples):
        raise IntaglioError(
            f"evaluate is {share}; of {len(examples)} examples that leaves {len(examples) - count} to train on"
        )
    keys = [hashlib.sha256(json.dumps(item, sort_keys=True, default=repr).encode()).digest() for item in examples]
    held_out = set(sorted(range(len(examples)), key=lambda index: keys[index])[:count])
    train = [item for index, item in enumerate(examples) if index not in held_out]
    return train, [examples[index] for index in sorted(held_out)]


def load_pairs(path: str | os.PathLike[str]) -> list[Example]:
    """Return the pairs of a file with one JSON object a line.

    Args:
        path: each line has `prompt` and `answer` (or `completion`), or `instruction`, perhaps `input`, and `output`.
            The name `docstrings` stands for the bundled pairs, see `docstring_pairs`.

    Raises:
        IntaglioError: the file cannot be read or is empty, or a line is malformed (it is named).
    """
    if os.fspath(path) == DOCSTRINGS:
        return docstring_pairs()
    pairs_read = (
        prompt_and_answer(value, place) for place, value in json_lines(path, "instructions", "prompt and answer")
    )
    return [{"prompt": prompt, "answer": answer} for prompt, answer in pairs_read]


def prompt_and_answer(value: Any, what: str) -> tuple[str, str]:
    """Return the prompt and the answer of a pair; `what` names it in error messages."""
    if not isinstance(value, Mapping):
        raise IntaglioError(f"{what} is {shorten(repr(value))}; an object with prompt and answer is accepted")
    for question, reply in NAMES:
        if question in value and reply in value:
            break
    else:
        known = ", ".join(sorted(key for key in value if key != "id")) or "nothing"
        raise IntaglioError(f"{what} has no prompt and answer (nor instruction and output); it has: {known}")
    prompt, answer, below = value[question], value[reply], value.get("input", "")
    for name, text in ((question, prompt), (reply, answer), ("input", below)):
        if not isinstance(text, str):
            raise IntaglioError(f"{what}: its {name} is {shorten(repr(text))}; only a string is accepted")
    if not answer.strip():
        raise IntaglioError(f"{what}: its {reply} is empty; there is nothing to learn from it")
    return (f"{prompt}\n{below}" if below and question == "instruction" else prompt), answer


def tokenize_pair(
    checkpoint: Checkpoint, example: Example, number: int, length: int, *, chat: bool
) -> tuple[list[int], list[int], list[int]]:
    """Return the token ids of a prompt, of its answer, cut to fit into `length`, and of the end-of-text token."""
    what = f"example {number} of the training data"
    question, reply = prompt_and_answer(example, what)
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise IntaglioError("the checkpoint has no tokenizer, so it cannot be trained on instruction pairs")
    if chat and getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        prompt = token_ids(checkpoint, question, what, end=False)
    stop = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    room = length - len(prompt) - len(stop)
    if room < 1 or not prompt:
        raise IntaglioError(
            f"{what}: its prompt is {len(prompt)} tokens; from 1 to {length - 1 - len(stop)} fit beside an answer"
        )
    answer = tokenizer(reply, add_special_tokens=False, verbose=False)["input_ids"]
    return list(prompt), list(answer[:room]), stop
