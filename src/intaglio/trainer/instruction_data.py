"""Instruction pairs: a prompt and the answer to learn, from a file or from a user's own examples."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intaglio.checkpoint import Checkpoint
from intaglio.data.docstrings import pairs
from intaglio.data.python_source import source_files
from intaglio.errors import IntaglioError, shorten
from intaglio.trainer.dataset import token_ids
from intaglio.trainer.protocols import Example

NAMES = (("prompt", "answer"), ("prompt", "completion"), ("instruction", "output"))
"""What the two halves may be called; an `input` beside an instruction stands below it."""


DOCSTRINGS = "docstrings"
"""The bundled pairs, by name."""


def docstring_pairs() -> list[Example]:
    """Return pairs out of the running interpreter's standard library, in the order of their hashes.

    The prompt asks for a function that does what a docstring's summary says, the answer is its code. Answers are long
    (about 400 characters in the middle), so most can be hidden in part.
    """
    found = {pair.id: pair for pair in pairs(source_files(), "code")}
    return [
        {
            "prompt": f"Write the Python function {pair.name} of the module {pair.module}. {pair.query}",
            "answer": pair.document,
        }
        for _, pair in sorted(found.items())
    ]


def train_eval_split(examples: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Return examples to train on and examples to evaluate on: those with the least hashes of what they say.

    Args:
        examples: pairs or texts.
        share: that is evaluated on, at least one of them.

    Raises:
        IntaglioError: none would be left to train on.
    """
    count = max(1, round(share * len(examples)))
    if count >= len(examples):
        raise IntaglioError(
            f"evaluate is {share}; of {len(examples)} examples that leaves {len(examples) - count} to train on"
        )
    keys = [hashlib.sha256(json.dumps(one, sort_keys=True, default=repr).encode()).digest() for one in examples]
    held_out = set(sorted(range(len(examples)), key=lambda place: keys[place])[:count])
    return (
        [one for place, one in enumerate(examples) if place not in held_out],
        [examples[place] for place in sorted(held_out)],
    )


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
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise IntaglioError(f"cannot read the instructions {file}: {reason}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise IntaglioError(f"line {number} of {file} is not JSON: {error}") from None
        prompt, answer = prompt_and_answer(value, f"line {number} of {file}")
        found.append({"prompt": prompt, "answer": answer})
    if not found:
        raise IntaglioError(
            f"the instructions {file} are empty; one JSON object a line with prompt and answer is needed"
        )
    return found


def prompt_and_answer(value: Any, what: str) -> tuple[str, str]:
    """Return the prompt and the answer of a pair.

    Args:
        value: what was read.
        what: names it in a sentence.

    Raises:
        IntaglioError: a half is missing, is no text or, of the answer, empty.
    """
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
    """Return the token ids of a prompt, of its answer, cut so that all fits, and of the end-of-text token.

    Args:
        checkpoint: its tokenizer is used.
        example: see `halves`.
        number: of the example, from 0.
        length: most tokens of all three.
        chat: whether the prompt is put into the tokenizer's chat template, if it has one.

    Raises:
        IntaglioError: the example is malformed, or its prompt leaves no room for an answer.
    """
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
