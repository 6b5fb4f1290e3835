"""What the claims of drafters share: a prompt continued and counted, where a text loops, Python prompts."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from intaglio.checkpoint import Checkpoint
from intaglio.data.python_source import source_files
from intaglio.errors import IntaglioError
from intaglio.evidence.experiment import Unit
from intaglio.speculative.loop import Speculative
from intaglio.speculative.protocols import Drafter, Step

LONGEST_LOOP = 32
"""Tokens of a period that counts as a loop."""


@dataclass(frozen=True)
class Generated:
    """What one prompt gave.

    Args:
        ids: the new tokens.
        steps: tokens that each pass emitted, the prefill's first.
        rows: tokens that the target read.
        seconds: wall time.
    """

    ids: tuple[int, ...]
    steps: tuple[int, ...]
    rows: int
    seconds: float

    def rate(self, tokens: int | None = None) -> float:
        """Tokens a pass, the prefill left out; of the first passes until that many tokens are there, or of all.

        Args:
            tokens: Default None: all.
        """
        emitted, passes = 0, 0
        for step in self.steps[1:]:
            if tokens is not None and emitted >= tokens:
                break
            emitted, passes = emitted + step, passes + 1
        return emitted / passes if passes else 1.0


def loop_start(ids: Sequence[int]) -> int:
    """Where a text begins to repeat itself until its end: the first place with a period of at most 32 tokens behind it,
    seen at least twice. The text's length where it does not.

    Args:
        ids: the text.
    """
    start = len(ids)
    for period in range(1, min(LONGEST_LOOP, len(ids) // 2) + 1):
        place = len(ids) - period
        while place > 0 and ids[place - 1] == ids[place - 1 + period]:
            place -= 1
        if len(ids) - place >= 2 * period:
            start = min(start, place)
    return start


def shifted_prompt(target: Checkpoint, unit: Unit, length: int) -> list[int]:
    """The first tokens of a Python file of the standard library, others for each prompt of a stage.

    Args:
        target: whose tokenizer is used.
        unit: stage and base decide the order of the files, index which of them.
        length: tokens.

    Raises:
        IntaglioError: there are not so many files.
    """
    found: dict[tuple[int, ...], None] = {}
    for text in _drawn_files(f"{unit.stage}:{unit.base}"):
        # So many characters hold the tokens, and a licence that many files begin with counts once.
        ids = target.tokenizer(text[: 16 * length], add_special_tokens=False, verbose=False)["input_ids"][:length]
        if len(ids) == length:
            found[tuple(ids)] = None
        if len(found) > unit.index:
            return list(ids)
    raise IntaglioError(f"Python file {unit.index} was asked for; {len(found)} begin with {length} tokens of their own")


@lru_cache(maxsize=4)
def _drawn_files(key: str) -> tuple[str, ...]:
    """All files in an order that the key decides."""

    def drawn(name: str) -> bytes:
        return hashlib.sha256(f"{key}:{name}".encode()).digest()

    return tuple(file.text for file in sorted(source_files(), key=lambda file: drawn(file.hash)))


def parameters(target: Checkpoint) -> int:
    """Of the whole model.

    Args:
        target: a checkpoint.
    """
    return sum(p.numel() for p in target.model.parameters())


def go_on(
    target: Checkpoint, drafter: Drafter, prompt: Sequence[int], new: int, prepack: bool | None = False
) -> Generated:
    """Go on from a prompt, greedily and past every stop token, so that each prompt gives as many tokens.

    Args:
        target: the model.
        drafter: where guesses come from.
        prompt: token ids.
        new: tokens.
        prepack: as in `Speculative`. Default False: the products that stock `generate` takes.
    """
    steps: list[int] = []
    rows = [0]

    def note(step: Step) -> None:
        steps.append(len(step.tokens))
        rows[0] += len(prompt) if step.tree is None else len(step.tree)

    loop = Speculative(drafter, on_step=note, prepack=prepack)
    ids = torch.tensor([list(prompt)], device=target.device)
    model: Any = target.model
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None,
                               "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    start = time.perf_counter()
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=loop, **options)
    seconds = time.perf_counter() - start
    return Generated(tuple(whole[0, len(prompt) :].tolist()), tuple(steps), rows[0], seconds)
