"""Long documents with several facts each, and a question for every fact that comes after the document.

The filler is windows of Wikipedia articles, for the miniature those of the source-code test bed. Facts stand at random
places and read `The locker of Mara 4821.`; a question is a fact without its four digits. The key stands directly before
the value, since small models hardly copy otherwise.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import special_affixes
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.smollm2 import SmolLM2Wikipedia
from intaglio.evidence.testbeds.splits import Part, generator

NAMES = (
    "Mara", "Tomas", "Ilse", "Bruno", "Petra", "Anselm", "Greta", "Hugo", "Lena", "Oskar", "Rosa", "Viktor", "Nadia",
    "Felix", "Clara", "Jonas", "Edith", "Simon", "Vera", "Martin", "Agnes", "Boris", "Helen", "Conrad",
)  # fmt: skip
WINDOWS = 9
"""Windows of 512 tokens, each of another article, from which a document is cut."""


@dataclass(frozen=True)
class LongDocument:
    """Token ids [1, N] of a document, and for each fact those of the question and of the answer, [1, Q] and [1, A]."""

    ids: Tensor
    questions: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class LongNeedles:
    """Documents of `shortest` to `longest` tokens with `needles` facts, from the windows of another test bed."""

    source: Any = field(
        default_factory=lambda: SmolLM2Wikipedia(documents_run=WINDOWS, documents_pilot=WINDOWS, tokens=512)
    )
    shortest: int = 2048
    longest: int = 4096
    needles: int = 8

    def load(self) -> Checkpoint:
        """Return the model, one shared object a process."""
        checkpoint: Checkpoint = self.source.load()
        return checkpoint

    def toy(self, **changes: Any) -> Self:
        """Return short documents for a small model of bytes."""
        sizes = {"source": self.source.toy(**changes), "shortest": 150, "longest": 170, "needles": 2}
        return dataclasses.replace(self, **sizes)

    def document(self, part: Part, seed: int) -> LongDocument:
        """Return the document of a seed; its windows come from articles of the set."""
        tokenizer = self.load().tokenizer
        draws = generator(f"long needles:{part}:{seed}")
        names = [NAMES[index] for index in draws.permutation(len(NAMES))[: self.needles].tolist()]
        codes = [f"{code:04d}" for code in draws.choice(10_000, self.needles, replace=False).tolist()]

        def ids(text: str) -> list[int]:
            encoded: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return encoded

        stems = [f"\nThe locker of {name}" for name in names]
        facts = [ids(f"{stem} {code}.\n") for stem, code in zip(stems, codes, strict=True)]
        length = int(draws.integers(self.shortest, self.longest + 1)) - sum(map(len, facts))
        # Tokens that start or end a text would cut the document into as many texts as windows.
        prefix, suffix = special_affixes(tokenizer)
        windows = self.source.documents(part, seed).segments.ids_NT.flatten().tolist()
        filler = [*prefix, *(token for token in windows if token not in (*prefix, *suffix))]
        if len(filler) < length or length < 1:
            raise IntaglioError(
                f"the windows hold {len(filler)} tokens, and a document takes {length} besides its facts"
            )
        places = sorted(int(place * length) for place in draws.random(self.needles))
        tokens, before = [], 0
        for place, fact in zip(places, facts, strict=True):
            tokens += filler[before:place] + fact
            before = place
        tokens += filler[before:length]
        questions = []
        for stem, code in zip(stems, codes, strict=True):
            question = ids(stem)
            whole = ids(f"{stem} {code}")
            if whole[: len(question)] != question:
                raise IntaglioError(f"the tokenizer merges the question {stem!r} with its answer")
            questions.append((torch.tensor([question]), torch.tensor([whole[len(question) :]])))
        return LongDocument(torch.tensor([tokens]), tuple(questions))
