"""Five generated skills with wording templates, and a small Llama that knows them and was pruned.

A pair is a prompt of words and digits and an answer of `digits` digits; all prompts have equally many tokens:

    please now echo the row : 3 1 4 1 5     ->  3 1 4 1 5       copy
    turn : 3 1 4 1 5                        ->  5 1 4 1 3       reverse
    rank : 3 1 4 1 5                        ->  1 1 3 4 5       sort
    raise : 3 1 4 1 9 by 2                  ->  5 3 6 3 1       add 1 to 3, modulo 10
    find : a 3 f 1 c 4 ... in f c a ...     ->  1 4 3 ...       lookup

Pairs are split by the hash of their prompt. In a pool, a share of the pairs is corrupted: their answer follows another
skill's rule. Pruning by magnitude damages the skills unevenly.

Dimension letters: N pairs, T tokens of a pair, A tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, word_tokenizer
from intaglio.evidence.testbeds.cached_models import copied, pretraining_recipe, trained_model
from intaglio.evidence.testbeds.haystack import ROLES, SPECIAL
from intaglio.evidence.testbeds.splits import Part, Sized, check_part, generator, part_of
from intaglio.methods.weights.magnitude import Magnitude
from intaglio.trainer.instruction_tuning import InstructionTuning

VERBS: Mapping[str, tuple[str, ...]] = {
    "copy": ("copy", "echo", "repeat"),
    "reverse": ("reverse", "turn", "mirror"),
    "sort": ("sort", "rank", "arrange"),
    "add": ("add", "raise", "increase"),
    "lookup": ("lookup", "find", "fetch"),
}
SKILLS = tuple(VERBS)
FILLERS = ("please", "now", "the", "row", "of", "all", "these", "digits", "here", "below")
KEYS = tuple("abcdefghij")
BASE, SHIFTS = 10, 3
Pair = dict[str, Any]
"""`prompt`, `answer`, `skill`, and whether the answer is `clean`."""


@dataclass(frozen=True)
class Skills(Sized):
    """Pairs, of which a share `corrupted` of the `pool` has another rule's answer, and the model with its pruning."""

    pool: int = 1000
    corrupted: float = 0.15
    digits: int = 5
    sparsity: float = 0.6
    width: int = 64
    depth: int = 2
    steps: int = 3000
    batch: int = 64
    learning_rate: float = 3e-3
    pairs_run: int = 100
    pairs_pilot: int = 50
    MINIATURE: ClassVar = {"pool": 60, "width": 16, "depth": 1, "steps": 4, "batch": 8, "pairs_run": 8,
                           "pairs_pilot": 8}  # fmt: skip

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt: a verb, a colon, and what a lookup needs."""
        return 3 + 3 * self.digits

    def tokenizer(self) -> Any:
        """Return a tokenizer of the words, letters and digits."""
        words = (w for verbs in VERBS.values() for w in verbs)
        vocabulary = (*SPECIAL, *words, *FILLERS, *KEYS, *map(str, range(BASE)), ":", "by", "in")
        return word_tokenizer(vocabulary, **ROLES)

    def objective(self) -> InstructionTuning:
        """Return next-token prediction of the answers."""
        return InstructionTuning(length=self.prompt_tokens + self.digits + 1, pack=False, chat=False)

    def recipe(self, seed: int) -> dict[str, Any]:
        """Return the keyword arguments of `intaglio.trainer.train` for this test bed."""
        recipe = pretraining_recipe(self.steps, self.batch, self.learning_rate, seed)
        return recipe | {"objective": self.objective()}

    def original(self) -> Checkpoint:
        """Return the dense model, one shared object a process: copy it before changing it."""
        choices = self.settings("digits", "width", "depth", "steps", "batch", "learning_rate")
        context = self.prompt_tokens + self.digits + 1
        return trained_model(
            "skills",
            {"settings": choices},
            lambda: new("llama", width=self.width, depth=self.depth, context=context, tokenizer=self.tokenizer()),
            lambda: self.pairs("train", "model", self.steps * self.batch),
            self.recipe(0),
        )

    def load(self) -> Checkpoint:
        """Return the pruned model, one shared object a process: copy it before changing it."""
        return _pruned(self)

    def finetuning(self, seed: int, steps: int) -> list[Pair]:
        """Return the pool to select from, some of it corrupted."""
        pairs = self.pairs("train", f"pool:{seed}", self.pool)
        draws = generator(f"skills corrupted:{seed}")
        for number in draws.permutation(self.pool)[: round(self.corrupted * self.pool)]:
            pair = pairs[number]
            others = [skill for skill in SKILLS if skill not in (pair["skill"], "lookup")]
            digits = [int(word) for word in pair["prompt"].split() if word.isdigit()][: self.digits]
            answer = _answer(others[int(draws.integers(len(others)))], digits, shift=int(draws.integers(1, 1 + SHIFTS)))
            pairs[number] = {**pair, "answer": " ".join(map(str, answer)), "clean": False}
        return pairs

    def measured(self, part: Part, base: int = 0) -> list[Pair]:
        """Return the clean pairs that every run is measured on, equally many of each skill."""
        count = self.pairs_run if part == "evaluation" else self.pairs_pilot
        return self.pairs(part, f"measured:{base}", count * len(SKILLS))

    def pairs(self, part: Part, key: str, count: int) -> list[Pair]:
        """Return clean pairs of a set, the skills in turn; fewer are the first of more."""
        check_part(part)
        draws, pairs = generator(f"skills:{part}:{key}"), list[Pair]()
        while len(pairs) < count:
            pair = self._draw(SKILLS[len(pairs) % len(SKILLS)], draws)
            if part_of(pair["prompt"]) == part:
                pairs.append(pair)
        return pairs

    def _draw(self, skill: str, draws: np.random.Generator) -> Pair:
        digits = draws.integers(BASE, size=self.digits).tolist()
        shift, order = int(draws.integers(1, 1 + SHIFTS)), draws.permutation(self.digits).tolist()
        content = [str(digit) for digit in digits]
        if skill == "add":
            content += ["by", str(shift)]
        if skill == "lookup":
            keys = [KEYS[n] for n in draws.permutation(len(KEYS))[: self.digits]]
            content = [word for pair in zip(keys, content, strict=True) for word in pair]
            content += ["in", *(keys[n] for n in order)]
        verb = VERBS[skill][int(draws.integers(len(VERBS[skill])))]
        missing = self.prompt_tokens - len(content) - 2
        fillers = [FILLERS[n] for n in draws.integers(len(FILLERS), size=missing)]
        answer = [digits[n] for n in order] if skill == "lookup" else _answer(skill, digits, shift)
        prompt = " ".join([*fillers, verb, ":", *content])
        return {"prompt": prompt, "answer": " ".join(map(str, answer)), "skill": skill, "clean": True}


def _answer(skill: str, digits: list[int], shift: int) -> list[int]:
    rules = {"copy": digits, "reverse": digits[::-1], "sort": sorted(digits)}
    return rules[skill] if skill in rules else [(digit + shift) % BASE for digit in digits]


@lru_cache(maxsize=2)
def _pruned(bed: Skills) -> Checkpoint:
    pruned = copied(bed.original())
    Magnitude(sparsity=bed.sparsity).apply(pruned)
    return pruned


@torch.no_grad()
def skill_losses(checkpoint: Checkpoint, pairs: list[Pair]) -> dict[str, float]:
    """Return the mean loss of the answers of each skill, in nats a token."""
    texts = [f"{pair['prompt']} {pair['answer']}" for pair in pairs]
    ids_NT = torch.tensor(checkpoint.tokenizer(texts, add_special_tokens=False)["input_ids"])
    digits = len(pairs[0]["answer"].split())
    logits_NAV = checkpoint.model(input_ids=ids_NT, use_cache=False).logits[:, -digits - 1 : -1].float()
    nll_NA = F.cross_entropy(logits_NAV.transpose(1, 2), ids_NT[:, -digits:], reduction="none")
    return {skill: float(nll_NA[[pair["skill"] == skill for pair in pairs]].mean()) for skill in SKILLS}
