"""A one-to-many language: each input has six valid kinds of output (modes), and each mode many wordings.

    <s> o3 o7 o11 ?   a2.0.1 o7 a2.1.0 o11 a2.2.0 o3 a2.3.1 </s>

The input is a set of three objects. A mode has an order of its own for them and words of its own between them; at each
of its four places it has two synonyms, of which the first is likelier. So beam search finds wordings of the likeliest
modes, and the share of modes among several outputs measures their diversity; a wrong object or word counts for nothing.
Input sets are split by their hash.

Dimension letters: N documents, T tokens of a document.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, word_tokenizer
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.cached_models import pretraining_recipe, trained_model
from intaglio.evidence.testbeds.haystack import BOS, EOS, QUESTION, ROLES, SPECIAL
from intaglio.evidence.testbeds.splits import BOUNDS, Part, Prompt, Sized, check_part, draw, generator, part_of

MODES = (0.35, 0.25, 0.15, 0.1, 0.1, 0.05)
"""Probabilities of the modes."""
SYNONYM = 0.7
"""Probability of the first synonym at each place."""
OBJECTS = 3
PLACES = OBJECTS + 1
ORDERS = tuple(itertools.permutations(range(OBJECTS)))
"""The order of the objects in each mode."""
LENGTH = 1 + OBJECTS + 1 + PLACES + OBJECTS + 1
WORDS = len(MODES) * PLACES * 2


def word(mode: int, place: int, synonym: int) -> int:
    """Return the token of a synonym."""
    return len(SPECIAL) + (mode * PLACES + place) * 2 + synonym


def output(objects: Sequence[int], mode: int, synonyms: Sequence[int]) -> list[int]:
    """Return the tokens of an output, the end included; `objects` are tokens."""
    words = [word(mode, place, synonym) for place, synonym in enumerate(synonyms)]
    ordered = [objects[index] for index in ORDERS[mode]]
    return [words[0], *itertools.chain(*zip(ordered, words[1:], strict=True)), EOS]


def mode_of(prompt: Sequence[int], ids: Sequence[int]) -> int | None:
    """Return the mode of an output, None if it is not valid for its prompt."""
    first = (ids[0] - len(SPECIAL)) // 2 if len(ids) > 0 else -1
    mode, place = divmod(first, PLACES)
    if place or not 0 <= mode < len(MODES) or len(ids) < 2 * PLACES:
        return None
    synonyms = [(ids[2 * p] - len(SPECIAL)) % 2 for p in range(PLACES)]
    return mode if list(ids[: 2 * PLACES]) == output(prompt[1 : 1 + OBJECTS], mode, synonyms) else None


def modes_found(prompt: Sequence[int], outputs: Sequence[Sequence[int]]) -> Mapping[str, float]:
    """Return the share of modes among the outputs, and the share of valid outputs."""
    modes = [mode_of(prompt, ids) for ids in outputs]
    valid = [mode for mode in modes if mode is not None]
    return {"modes found": len(set(valid)) / len(MODES), "valid outputs": len(valid) / len(outputs)}


@dataclass(frozen=True)
class OneToMany(Sized):
    """Number of objects, prompts of a unit, and the size of a small Llama that is trained on the language."""

    objects: int = 24
    each: int = 8
    width: int = 64
    depth: int = 2
    steps: int = 1500
    batch: int = 64
    learning_rate: float = 3e-3
    MINIATURE: ClassVar = {"objects": 24, "each": 2, "width": 32, "depth": 1, "steps": 150, "batch": 16}

    def new(self, seed: int) -> Checkpoint:
        """Return an untrained Llama."""
        words = [f"a{m}.{p}.{s}" for m in range(len(MODES)) for p in range(PLACES) for s in range(2)]
        tokenizer = word_tokenizer((*SPECIAL, *words, *(f"o{i}" for i in range(self.objects))), **ROLES)
        return new(
            "llama", width=self.width, depth=self.depth, context=2 * LENGTH, seed=seed % 2**32, tokenizer=tokenizer
        )

    def training(self, seed: int) -> Segments:
        """Return the training documents, a wording of a mode for each."""
        inputs = _inputs(self.objects)["train"]
        rows = []
        draws = generator(f"one to many:{seed}")
        for _ in range(self.steps * self.batch):
            objects = inputs[draws.integers(len(inputs))]
            mode = int(draws.choice(len(MODES), p=MODES))
            synonyms = (draws.random(PLACES) >= SYNONYM).astype(int).tolist()
            rows.append([BOS, *objects, QUESTION, *output(objects, mode, synonyms)])
        return Segments.of(rows)

    def load(self) -> Checkpoint:
        """Return the trained model, one shared object a process: copy it before changing it."""
        sizes = self.settings("objects", "width", "depth", "steps", "batch", "learning_rate")
        recipe = pretraining_recipe(self.steps, self.batch, self.learning_rate, 0)
        return trained_model("one_to_many", {"settings": sizes}, lambda: self.new(0), lambda: self.training(0), recipe)

    def source(self, part: Part, index: int, base: int = 0) -> tuple[Prompt, ...]:
        """Return the prompts of the unit at an index of a set; another base gives another order."""
        check_part(part)
        inputs = _inputs(self.objects)[part]
        names = [" ".join(map(str, objects)) for objects in inputs]
        order = draw(f"one to many {part}:{base}", names, len(names), f"{part} inputs")
        chosen = order[index * self.each : (index + 1) * self.each]
        if len(chosen) < self.each:
            most = len(inputs) // self.each
            raise IntaglioError(f"unit {index} was requested; the {part} set has {most} of {self.each} inputs")
        return tuple(Prompt("set", names[i], (BOS, *inputs[i], QUESTION)) for i in chosen)


@lru_cache(maxsize=4)
def _inputs(objects: int) -> dict[Part, tuple[tuple[int, ...], ...]]:
    """Every input, as tokens, by set."""
    by_part: dict[Part, list[tuple[int, ...]]] = {part: [] for part in BOUNDS}
    for chosen in itertools.combinations(range(len(SPECIAL) + WORDS, len(SPECIAL) + WORDS + objects), OBJECTS):
        by_part[part_of(" ".join(map(str, chosen)))].append(chosen)
    return {part: tuple(inputs) for part, inputs in by_part.items()}
