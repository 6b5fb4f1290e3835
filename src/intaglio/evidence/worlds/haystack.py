"""A needle-in-a-haystack language for small models: facts hidden in filler, and questions about them at the end.

A document is `<s>`, filler words with facts among them, and then questions:

    <s> w3 w3 w9 k7 k2 v4 w1 ... k5 k1 v8 ... w6 ? k7 k2 v4

The filler is a Markov chain of order 1 over `words` words, the same for all sets. A fact is a key of `key_tokens`
tokens and a value of `value_tokens` tokens, drawn at random: a document's facts can be known from that document alone.
The keys of a document differ from one another in every token. The combinations that make keys are sealed by their hash:
every key token is seen in training, a key of the evaluation never is. Documents follow from (seed, set, index).

Dimension letters: N documents, T tokens of a document, Q questions, A tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.evidence.experiment import Stage
from intaglio.evidence.worlds.sealing import MEASURED, Bounds, Part, check_count, check_part, generator, part_of

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>", "<unk>", "?")
"""The first tokens of the vocabulary; their places are their ids."""
PAD, BOS, EOS, MASK, UNKNOWN, QUESTION = range(len(SPECIAL))
BOUNDS: Bounds = {"train": (0, 600), "validation": (600, 700), "pilot": (700, 800), "evaluation": (800, 1000)}
"""Which remainders of a key's hash are in which set."""
MOST_KEYS = 1_000_000
CONCENTRATION = 0.1
"""Of the Dirichlet distribution that the filler's transition probabilities are drawn from: a word has about two or
three likely successors out of 16."""


@dataclass(frozen=True, eq=False)
class Needles:
    """Documents, and where their answers are.

    Args:
        segments: token ids [N, T].
        places_NQA: int64, positions of the answers' tokens.
        depths_NQ: share of the filler that stands before the fact that is asked for, 0 to 1.
        names: of the documents: set, seed and index.
    """

    segments: Segments
    places_NQA: Tensor
    depths_NQ: Tensor
    names: tuple[str, ...]

    @property
    def answers_NQA(self) -> Tensor:
        """The tokens that are to be said."""
        flat_NP = self.segments.ids_NT.gather(1, self.places_NQA.flatten(1))
        return flat_NP.view_as(self.places_NQA)

    @property
    def labels_NT(self) -> Tensor:
        """Ids where an answer stands and -100 elsewhere, not shifted: what `labels=` of a causal model takes."""
        ids_NT = self.segments.ids_NT
        answer_NT = torch.zeros_like(ids_NT, dtype=torch.bool).scatter_(1, self.places_NQA.flatten(1), True)
        return ids_NT.masked_fill(~answer_NT, -100)

    @property
    def prompts_NT(self) -> Tensor:
        """Each document up to its first answer, which is the same length in all: what `generate` goes on from."""
        return self.segments.ids_NT[:, : int(self.places_NQA[0, 0, 0])]

    def right_NQ(self, said_NT: Tensor) -> Tensor:
        """Which questions are answered, every token of the answer right.

        With what a model says greedily at every position of the document this is what `generate` would get for the
        first question: after a wrong token it does not matter how it goes on.

        Args:
            said_NT: the next token that is predicted at each position; only those before answers are looked at.
        """
        said_NP = said_NT.gather(1, (self.places_NQA - 1).flatten(1))
        return (said_NP.view_as(self.places_NQA) == self.answers_NQA).all(-1)


@torch.no_grad()
def answered(model: nn.Module, needles: Needles, batch_size: int = 64) -> Tensor:
    """Which questions a causal model answers, bool [N, Q].

    Args:
        model: called with `input_ids`; its output has `logits` [N, T, V].
        needles: documents.
        batch_size: documents that pass at a time. Default 64.
    """
    device = next(model.parameters()).device
    said = [
        model(input_ids=batch["input_ids"].to(device)).logits.argmax(-1).cpu()
        for batch in needles.segments.batches(batch_size)
    ]
    return needles.right_NQ(torch.cat(said))


@dataclass(frozen=True)
class Haystack:
    """The world: one language, and how much of it is used.

    Args:
        length: tokens of a document, everything included. Default 64.
        facts: in a document. Default 4.
        questions: at its end, each about another fact. Default 1.
        words: of the filler. Default 16.
        keys: different tokens that keys are spelled with; at least twice as many as facts. Default 32.
        key_tokens: of a key, at least 2 (with 1, the keys of the evaluation would be words without meaning). Default 2.
        values: different tokens that values are spelled with. Default 16: guessing is right in 1 of 16.
        value_tokens: of a value, drawn independently. Default 1.
        language: decides the filler's transitions. Default 0.
        documents_run: evaluation documents of a run. Default 512.
        documents_pilot: of the pilot. Default 256.

    Raises:
        IntaglioError: a number is out of range, or the document has no room for its facts and questions.
    """

    length: int = 64
    facts: int = 4
    questions: int = 1
    words: int = 16
    keys: int = 32
    key_tokens: int = 2
    values: int = 16
    value_tokens: int = 1
    language: int = 0
    documents_run: int = 512
    documents_pilot: int = 256

    def __post_init__(self) -> None:
        least = {"facts": 1, "questions": 1, "words": 2, "key_tokens": 2, "values": 2, "value_tokens": 1}
        for name, bound in (least | {"keys": 2 * self.facts}).items():
            if getattr(self, name) < bound:
                raise IntaglioError(f"{name} is {getattr(self, name)}; at least {bound} is accepted")
        if self.questions > self.facts:
            raise IntaglioError(f"questions is {self.questions}; there are {self.facts} facts to ask for")
        if self._filler(self.length) < 0:
            needed = self.length - self._filler(self.length)
            raise IntaglioError(f"length is {self.length}; facts and questions alone take {needed} tokens")
        if self.keys**self.key_tokens > MOST_KEYS:
            raise IntaglioError(
                f"keys and key_tokens give {self.keys**self.key_tokens:,} different keys; at most {MOST_KEYS:,} are"
                " accepted"
            )
        sizes = {part: len(self.sealed(part)) for part in BOUNDS}
        small = min(sizes, key=lambda part: sizes[part])
        if sizes[small] < 4 * self.facts:
            raise IntaglioError(
                f"keys is {self.keys}; the {small} set then has {sizes[small]} keys, and {4 * self.facts} are needed"
            )

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """How each token is spelled, by id: specials, words `w0`, key tokens `k0`, value tokens `v0` and so on."""
        groups = (("w", self.words), ("k", self.keys), ("v", self.values))
        return SPECIAL + tuple(f"{letter}{i}" for letter, count in groups for i in range(count))

    def tokenizer(self) -> Any:
        """A tokenizer of the vocabulary: tokens are separated by white space, and nothing is added to them."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        ids = {token: i for i, token in enumerate(self.vocabulary)}
        backend = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[UNKNOWN]))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        names = {"pad": PAD, "bos": BOS, "eos": EOS, "mask": MASK, "unk": UNKNOWN}
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, **{f"{name}_token": SPECIAL[place] for name, place in names.items()}
        )

    def sealed(self, part: Part) -> tuple[tuple[int, ...], ...]:
        """The keys of a set, as numbers of key tokens.

        Args:
            part: which set.
        """
        check_part(part, BOUNDS)
        return _sealed(self.keys, self.key_tokens)[part]

    def training(self, seed: int, count: int, start: int = 0) -> Needles:
        """Training documents; there is no end of them.

        Args:
            seed: decides all of them.
            count: N.
            start: index of the first. Default 0.
        """
        return self.draw("train", count, seed, start=start)

    def validation(self, count: int, seed: int = 0) -> Needles:
        """Documents to choose settings on.

        Args:
            count: N.
            seed: decides them. Default 0.
        """
        return self.draw("validation", count, seed)

    def documents(
        self, stage: Stage, base: int = 0, *, depth: float | None = None, length: int | None = None
    ) -> Needles:
        """What every run of a stage is measured on.

        Args:
            stage: pilots have keys of their own.
            base: another seed base gives other documents.
            depth: where the first question's fact stands; see `draw`.
            length: tokens, where not the world's.
        """
        count = self.documents_run if stage == "run" else self.documents_pilot
        return self.draw(MEASURED[stage], count, base, depth=depth, length=length)

    def draw(
        self,
        part: Part,
        count: int,
        seed: int,
        *,
        start: int = 0,
        depth: float | None = None,
        length: int | None = None,
    ) -> Needles:
        """Documents of a set.

        Args:
            part: which set.
            count: N.
            seed: with the set and the index of a document, decides it.
            start: index of the first. Default 0.
            depth: share of the filler before the fact that is asked for first, 0 (front) to 1 (next to the questions).
                All else is as without it. Default None: at random, like the other facts.
            length: tokens T of a document. Default None: the world's.

        Raises:
            IntaglioError: an argument is out of range.
        """
        keys = self.sealed(part)
        check_count("documents", count)
        if depth is not None and not 0 <= depth <= 1:
            raise IntaglioError(f"depth is {depth}; it must lie between 0 (the front) and 1 (next to the questions)")
        length = self.length if length is None else length
        filler = self._filler(length)
        if filler < 0:
            raise IntaglioError(f"length is {length}; facts and questions alone take {length - filler} tokens")
        names = tuple(f"{part}-{seed}-{index}" for index in range(start, start + count))
        drawn = [self._one(name, keys, filler) for name in names]
        asked_NQ = np.stack([one.asked for one in drawn])
        gaps_NF = np.stack([one.gaps for one in drawn])
        if depth is not None:
            gaps_NF[np.arange(count), asked_NQ[:, 0]] = round(depth * filler)
        ids_NT, places_NQA = self._written(
            self._walk(np.stack([one.uniform for one in drawn])),
            gaps_NF,
            np.stack([one.facts for one in drawn]),
            asked_NQ,
        )
        depths_NQ = np.take_along_axis(gaps_NF, asked_NQ, 1) / max(filler, 1)
        return Needles(
            Segments.of(torch.from_numpy(ids_NT)), torch.from_numpy(places_NQA), torch.from_numpy(depths_NQ), names
        )

    def _filler(self, length: int) -> int:
        """Words that a document of that many tokens has room for."""
        fact = self.key_tokens + self.value_tokens
        return length - 1 - self.facts * fact - self.questions * (1 + fact)

    def _one(self, name: str, keys: Sequence[tuple[int, ...]], filler: int) -> _Drawn:
        draws = generator(f"haystack:{self.language}:{name}")
        asked = draws.permutation(self.facts)[: self.questions]
        value_FA = draws.integers(self.values, size=(self.facts, self.value_tokens))
        # A uniform number first, so that what follows does not depend on the length.
        gaps = np.floor(draws.random(self.facts) * (filler + 1)).astype(np.int64)
        key_FK = np.array(self._apart(draws, keys))
        first_key, first_value = len(SPECIAL) + self.words, len(SPECIAL) + self.words + self.keys
        facts = np.concatenate([first_key + key_FK, first_value + value_FA], axis=1)
        return _Drawn(asked, gaps, facts, draws.random(filler))

    def _apart(self, draws: np.random.Generator, keys: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """As many keys as there are facts, no two with the same token in the same place."""
        while True:
            chosen: list[tuple[int, ...]] = []
            used: set[tuple[int, int]] = set()
            for place in draws.permutation(len(keys)):
                spelled = set(enumerate(keys[place]))
                if used.isdisjoint(spelled):
                    chosen.append(keys[place])
                    used |= spelled
                if len(chosen) == self.facts:
                    return chosen

    def _walk(self, uniform_NW: np.ndarray) -> np.ndarray:
        """The filler: a path of the Markov chain for each row of uniform numbers."""
        start_W, step_WW = _language(self.words, self.language)
        path_NW = np.empty(uniform_NW.shape, dtype=np.int64)
        for place in range(uniform_NW.shape[1]):
            bounds = start_W[None] if place == 0 else step_WW[path_NW[:, place - 1]]
            path_NW[:, place] = (uniform_NW[:, place, None] >= bounds[:, :-1]).sum(1)
        return len(SPECIAL) + path_NW

    def _written(
        self, filler_NW: np.ndarray, gaps_NF: np.ndarray, facts_NFL: np.ndarray, asked_NQ: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The documents, and the places of their answers."""
        count, n_facts, fact = facts_NFL.shape
        rows = np.arange(count)
        order_NF = np.argsort(gaps_NF, axis=1, kind="stable")
        rank_NF = np.argsort(order_NF, axis=1, kind="stable")
        begin_NF = 1 + gaps_NF + fact * rank_NF
        body = 1 + filler_NW.shape[1] + n_facts * fact
        ids_NT = np.full((count, body + self.questions * (1 + fact)), BOS, dtype=np.int64)
        of_fact_NT = np.zeros(ids_NT.shape, dtype=bool)
        place_NFL = begin_NF[:, :, None] + np.arange(fact)
        of_fact_NT[rows[:, None, None], place_NFL] = True
        of_fact_NT[:, 0] = True
        of_fact_NT[:, body:] = True
        ids_NT[~of_fact_NT] = filler_NW.ravel()  # every row has the same number of places, so rows stay apart
        ids_NT[rows[:, None, None], place_NFL] = facts_NFL
        asked_NQL = facts_NFL[rows[:, None], asked_NQ]
        question_NQL = np.concatenate([np.full((*asked_NQ.shape, 1), QUESTION), asked_NQL], axis=2)
        ids_NT[:, body:] = question_NQL.reshape(count, -1)
        answer_Q = body + (1 + fact) * np.arange(self.questions) + 1 + self.key_tokens
        places_QA = answer_Q[:, None] + np.arange(self.value_tokens)
        return ids_NT, np.broadcast_to(places_QA, (count, *places_QA.shape)).copy()


@dataclass(frozen=True, eq=False)
class _Drawn:
    """What is drawn for one document: facts that are asked for, words before each fact, facts' tokens, and a uniform
    number for each word."""

    asked: np.ndarray
    gaps: np.ndarray
    facts: np.ndarray
    uniform: np.ndarray


@lru_cache(maxsize=8)
def _sealed(keys: int, key_tokens: int) -> dict[Part, tuple[tuple[int, ...], ...]]:
    """Every combination, in the set that its hash says."""
    found: dict[Part, list[tuple[int, ...]]] = {part: [] for part in BOUNDS}
    for key in itertools.product(range(keys), repeat=key_tokens):
        found[part_of(" ".join(f"k{token}" for token in key), BOUNDS)].append(key)
    return {part: tuple(combinations) for part, combinations in found.items()}


@lru_cache(maxsize=8)
def _language(words: int, language: int) -> tuple[np.ndarray, np.ndarray]:
    """Upper bounds of the first word's probabilities [W] and of each word's successors' [W, W]."""
    draws = generator(f"haystack language:{words}:{language}")
    step_WW = draws.dirichlet(np.full(words, CONCENTRATION), size=words)
    return np.full(words, 1 / words).cumsum(), step_WW.cumsum(1)
