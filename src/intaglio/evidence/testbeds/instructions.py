"""Instruction pairs of four kinds for SmolLM2: a pool to select from, and held-out answers of the same kinds.

Each pair is made from a Wikipedia article (split as in `smollm2`) or a module of the standard library; no two sets
share one.

- `code`: a summary, and the function that it describes.
- `explain`: a function, and what it does, in a sentence.
- `document`: a summary, and the rest of the documentation.
- `article`: the beginning of a paragraph of an article, and how it continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, get_args

import torch

from intaglio.checkpoint import Checkpoint
from intaglio.data.docstrings import Pair, pairs
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.prompts import Prompts
from intaglio.evidence.testbeds.smollm2 import SmolLM2Wikipedia
from intaglio.evidence.testbeds.splits import Part, draw
from intaglio.trainer.causal_lm import IGNORED, causal_batch

Kind = Literal["code", "explain", "document", "article"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LONG = 300
"""The least characters of a paragraph that is split into a beginning and a continuation."""
BATCH = 8
"""Answers measured in a batch."""
_QUESTIONS = {
    "code": "Write the Python function {0.name} of the module {0.module}. {0.query}",
    "explain": "Say in a sentence what this Python function does.\n\n{0.document}",
    "document": "Go on with the documentation of {0.name} in the module {0.module}. {0.query}",
}


@dataclass(frozen=True)
class Instruction:
    """An instruction pair."""

    kind: Kind
    name: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Instructions:
    """Number and lengths of the pairs.

    Args:
        each_pool: pairs of each kind in a pool. Default 50.
        prompt_tokens: most tokens of a prompt. Default 48.
        answer_tokens: most tokens of an answer. Default 48.
    """

    prompts: Prompts = field(default_factory=lambda: Prompts(articles=SmolLM2Wikipedia(samples=16, length=128)))
    each_pool: int = 50
    each_run: int = 10
    each_pilot: int = 6
    prompt_tokens: int = 48
    answer_tokens: int = 48

    def load(self) -> Checkpoint:
        """Return the dense model, one shared object a process: copy it before changing it."""
        return self.prompts.load()

    def pool(self, seed: int) -> tuple[Instruction, ...]:
        """Return training pairs to select from, equally many of each kind."""
        return self._draw("train", self.each_pool, f"pool:{seed}")

    def measured(self, part: Part, base: int = 0) -> tuple[Instruction, ...]:
        """Return the pairs of a set whose answers every run is measured on; another base gives other pairs."""
        return self._draw(part, self.each_run if part == "evaluation" else self.each_pilot, f"measured:{base}")

    def _draw(self, part: Part, count: int, key: str) -> tuple[Instruction, ...]:
        return tuple(pair for kind in KINDS for pair in self._of_kind(kind, part, count, f"{kind} {part} {key}"))

    def _of_kind(self, kind: Kind, part: Part, count: int, key: str) -> list[Instruction]:
        tokenizer = self.load().tokenizer
        known = _texts(self.prompts, kind, part)
        drawn: list[Instruction] = []
        for index in draw(f"instructions {key}", [name for name, _, _ in known], len(known)):
            name, question, text = known[index]
            if kind == "article":
                ids = _ids(tokenizer, question)[: self.prompt_tokens // 2 + self.answer_tokens]
                start, text = (tokenizer.decode(part) for part in _cut(ids, self.prompt_tokens // 2))
                question = f"Go on with this article.\n\n{start}"
            else:
                question = tokenizer.decode(_ids(tokenizer, question)[: self.prompt_tokens - 1])
            answer = tokenizer.decode(_ids(tokenizer, text)[: self.answer_tokens])
            if answer.strip():
                drawn.append(Instruction(kind, f"{kind} {name}", f"{question}\n", answer))
            if len(drawn) == count:
                return drawn
        raise IntaglioError(f"{count} {kind} pairs were requested; the {part} set has texts for {len(drawn)}")


def _cut(ids: list[int], at: int) -> tuple[list[int], list[int]]:
    return ids[:at], ids[at:]


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@lru_cache(maxsize=32)
def _texts(prompts: Prompts, kind: Kind, part: Part) -> tuple[tuple[str, str, str], ...]:
    """`(name, question, answer)` for everything in a set that a kind can be made from."""
    if kind == "article":
        corpus = prompts.articles.part(part)
        return tuple(
            (f"{digest[:12]}:{number}", paragraph, "")
            for digest, text in zip(corpus.hashes, corpus.documents, strict=True)
            for number, paragraph in enumerate(text.split("\n\n"))
            if len(paragraph) >= LONG
        )
    return tuple(
        (pair.id, _QUESTIONS[kind].format(pair), pair.query if kind == "explain" else pair.document)
        for pair in _documented(prompts, "text" if kind == "document" else "code", part)
    )


@lru_cache(maxsize=8)
def _documented(prompts: Prompts, kind: Literal["code", "text"], part: Part) -> tuple[Pair, ...]:
    return tuple(pairs(prompts.modules(part), kind))


@torch.no_grad()
def answer_losses(checkpoint: Checkpoint, pairs: Sequence[Instruction]) -> dict[str, float]:
    """Return the mean negative log-likelihood of each answer after its prompt, in nats a token, by name."""
    losses: dict[str, float] = {}
    for start in range(0, len(pairs), BATCH):
        part = pairs[start : start + BATCH]
        batch = causal_batch([as_row(checkpoint.tokenizer, pair) for pair in part])
        target_BT = batch.pop("target").to(checkpoint.device)
        inputs = {name: value.to(checkpoint.device) for name, value in batch.items() if name != "weight"}
        logits_BTV = checkpoint.model(**inputs, use_cache=False).logits.float()
        nll_BT = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), target_BT.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(target_BT.shape)
        mean_B = nll_BT.sum(1) / (target_BT != IGNORED).sum(1)
        losses.update(zip((pair.name for pair in part), mean_B.tolist(), strict=True))
    return losses


def as_row(tokenizer: Any, pair: Instruction) -> dict[str, Any]:
    """Return a pair as a training row in which only the answer's tokens are predicted."""
    prompt, answer = _ids(tokenizer, pair.prompt), _ids(tokenizer, pair.answer)
    ids_T = torch.tensor([*prompt, *answer])
    labels_T = ids_T.clone()
    labels_T[: len(prompt)] = IGNORED
    return {"input_ids": ids_T, "labels": labels_T}
