"""Instruction pairs of four kinds for SmolLM2: a pool to choose from, and held-out answers of the same kinds.

Each pair is made from something that was sealed by its hash: a Wikipedia article (as in `smollm2`) or a module of the
standard library. So no two sets share an article or a module.

    world = Instructions()
    pool = world.pool(seed)             # to choose from and to train on
    pairs = world.measured("run")       # log-perplexity is taken on their answers

- `code`: a summary, and the function that does it.
- `explain`: a function, and what it does, in a sentence.
- `document`: a summary, and the rest of the documentation.
- `article`: the beginning of a paragraph of an article, and how it goes on.
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
from intaglio.evidence.experiment import Stage
from intaglio.evidence.worlds.prompts import Prompts
from intaglio.evidence.worlds.sealing import MEASURED, Part, check_count, draw
from intaglio.evidence.worlds.smollm2 import Part as Articles
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia
from intaglio.trainer.causal_lm import IGNORED, causal_batch

Kind = Literal["code", "explain", "document", "article"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_ARTICLES: dict[Part, Articles] = {
    "train": "fitting", "validation": "validation", "pilot": "pilot", "evaluation": "evaluation",
}  # fmt: skip
LONG = 300
"""Characters of a paragraph that can be begun and gone on with, at the least."""
BATCH = 8
"""Answers that are measured at a time."""


@dataclass(frozen=True)
class Instruction:
    """A pair.

    Args:
        kind: which of the four.
        name: of what it was made from, and of the kind: no other pair of its draw has it.
        prompt: the text of the prompt.
        answer: the text of the answer.
    """

    kind: Kind
    name: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Instructions:
    """The world: how many pairs, and how long.

    Args:
        prompts: gives the model, the articles and the modules. Default SmolLM2, Wikipedia (16
            windows of 128 tokens to calibrate on), the standard library.
        each_pool: pairs of each kind in a pool. Default 50.
        each_run: pairs of each kind that a run is measured on. Default 10.
        each_pilot: that a pilot is measured on, and tuning. Default 6.
        asked: tokens of a prompt at the most. Default 48.
        said: tokens of an answer at the most. Default 48.

    Raises:
        IntaglioError: a number is below 1.
    """

    prompts: Prompts = field(default_factory=lambda: Prompts(articles=SmolLM2Wikipedia(samples=16, length=128)))
    each_pool: int = 50
    each_run: int = 10
    each_pilot: int = 6
    asked: int = 48
    said: int = 48

    def __post_init__(self) -> None:
        for name in ("each_pool", "each_run", "each_pilot", "asked", "said"):
            check_count(name, getattr(self, name))

    def load(self) -> Checkpoint:
        """The dense model, one object a process: copy it before it is carved."""
        return self.prompts.load()

    def pool(self, seed: int) -> tuple[Instruction, ...]:
        """Pairs to choose from, equally many of each kind.

        Args:
            seed: decides which.
        """
        return self._drawn("train", self.each_pool, f"pool:{seed}")

    def measured(self, stage: Stage, base: int = 0) -> tuple[Instruction, ...]:
        """Pairs whose answers every run of a stage is measured on, equally many of each kind.

        Args:
            stage: pilots have articles and modules of their own, and so has tuning.
            base: another seed base gives other pairs of the set.
        """
        return self._drawn(MEASURED[stage], self.each_run if stage == "run" else self.each_pilot, f"measured:{base}")

    def _drawn(self, part: Part, count: int, key: str) -> tuple[Instruction, ...]:
        return tuple(one for kind in KINDS for one in self._of_kind(kind, part, count, f"{kind} {part} {key}"))

    def _of_kind(self, kind: Kind, part: Part, count: int, key: str) -> list[Instruction]:
        tokenizer = self.load().tokenizer
        known = _texts(self.prompts, kind, part)
        found: list[Instruction] = []
        for place in draw(f"instructions {key}", [name for name, _, _ in known], len(known)):
            name, asked, said = known[place]
            if kind == "article":
                ids = _ids(tokenizer, asked)[: self.asked // 2 + self.said]
                begin, rest = tokenizer.decode(ids[: self.asked // 2]), tokenizer.decode(ids[self.asked // 2 :])
                pair = (f"Go on with this article.\n\n{begin}", rest)
            else:
                pair = (tokenizer.decode(_ids(tokenizer, asked)[: self.asked - 1]), said)
            prompt, answer = pair[0] + "\n", tokenizer.decode(_ids(tokenizer, pair[1])[: self.said])
            if answer.strip():
                found.append(Instruction(kind, f"{kind} {name}", prompt, answer))
            if len(found) == count:
                return found
        raise IntaglioError(f"{count} {kind} pairs were asked for; the {part} set has texts for {len(found)}")


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@lru_cache(maxsize=32)
def _texts(prompts: Prompts, kind: Kind, part: Part) -> tuple[tuple[str, str, str], ...]:
    """`(name, what is asked, what is said)` of everything in a set that a kind can be made from."""
    if kind == "article":
        corpus = prompts.articles.part(_ARTICLES[part])
        return tuple(
            (f"{digest[:12]}:{place}", paragraph, "")
            for digest, text in zip(corpus.hashes, corpus.documents, strict=True)
            for place, paragraph in enumerate(text.split("\n\n"))
            if len(paragraph) >= LONG
        )
    found = _documented(prompts, "text" if kind == "document" else "code", part)
    ask = {
        "code": "Write the Python function {name} of the module {module}. {query}",
        "explain": "Say in a sentence what this Python function does.\n\n{document}",
        "document": "Go on with the documentation of {name} in the module {module}. {query}",
    }[kind]
    written = [
        (one.id, ask.format(name=one.name, module=one.module, query=one.query, document=one.document), one)
        for one in found
    ]
    return tuple((name, asked, one.query if kind == "explain" else one.document) for name, asked, one in written)


@lru_cache(maxsize=8)
def _documented(prompts: Prompts, kind: Literal["code", "text"], part: Part) -> tuple[Pair, ...]:
    return tuple(pairs(prompts.modules(part), kind))


@torch.no_grad()
def answer_losses(checkpoint: Checkpoint, pairs: Sequence[Instruction]) -> dict[str, float]:
    """The mean negative log-likelihood of each answer behind its prompt, in nats a token, by the name of the pair.

    Args:
        checkpoint: what is measured.
        pairs: prompts and answers.
    """
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
    """A pair as tokens, of which those of the answer are predicted.

    Args:
        tokenizer: of the model.
        pair: prompt and answer.
    """
    asked, said = _ids(tokenizer, pair.prompt), _ids(tokenizer, pair.answer)
    ids_T = torch.tensor([*asked, *said])
    labels_T = ids_T.clone()
    labels_T[: len(asked)] = IGNORED
    return {"input_ids": ids_T, "labels": labels_T}
