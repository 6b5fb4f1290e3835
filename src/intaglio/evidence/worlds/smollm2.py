"""SmolLM2-135M-Instruct with English Wikipedia: a real model for what is carved without training.

Articles are sealed by their hash into three sets that share none: calibration, evaluation of pilots, evaluation of
runs. What chooses settings does so within the first of them, which is cut in two for that: `fitting` and `validation`.

    world = SmolLM2Wikipedia()
    checkpoint = world.load()                                       # copy it before it is carved
    Wanda(sparsity=0.5).apply(copy, world.calibration(seed).segments)
    losses = quality(copy, world.documents("run").segments).losses  # nats a token

The evaluation articles are none of those that Intaglio's own development measured on (`Corpus.split` holds out
hashes below 200 of 1000; here these are among the calibration articles).

Dimension letters: N documents, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from intaglio.checkpoint import Checkpoint, load
from intaglio.data.segments import Segments, special_affixes
from intaglio.data.texts import Corpus, load_texts
from intaglio.errors import IntaglioError
from intaglio.evidence.experiment import Stage
from intaglio.evidence.worlds.sealing import Windows, keyed

Part = Literal["calibration", "fitting", "validation", "pilot", "evaluation"]
BOUNDS: dict[Part, tuple[int, int]] = {
    "calibration": (0, 500),
    "fitting": (0, 400),
    "validation": (400, 500),
    "pilot": (500, 600),
    "evaluation": (600, 1000),
}
"""Which remainders of a document's hash modulo 1000 are in which set."""


@dataclass(frozen=True)
class SmolLM2Wikipedia:
    """The world: where model and texts come from, and how much of them is used.

    Args:
        model: what is loaded; tests put a tiny checkpoint here. Default the bundled `smollm2`.
        texts: default the bundled `wikipedia`.
        samples: calibration documents of a draw, one window each. Default 32.
        length: tokens of a calibration window. Default 256.
        documents_run: evaluation documents of a run. Default 24.
        documents_pilot: of the pilot. Default 10.
        tokens: of an evaluation window. Default 256.
    """

    model: str = "smollm2"
    texts: str = "wikipedia"
    samples: int = 32
    length: int = 256
    documents_run: int = 24
    documents_pilot: int = 10
    tokens: int = 256

    def load(self) -> Checkpoint:
        """The dense model, one object a process: copy it before it is carved."""
        return _load(self.model)

    def part(self, part: Part) -> Corpus:
        """The documents of a sealed set.

        Args:
            part: which.
        """
        return _sealed(self.texts, part)

    def calibration(self, seed: int, stage: Stage = "run") -> Windows:
        """A calibration draw: as the pruning papers have it, a window at random out of each of some random documents.

        Args:
            seed: decides documents and places.
            stage: while tuning, none of the documents of `validation` is drawn. Default `run`.
        """
        part: Part = "fitting" if stage == "tuning" else "calibration"
        return self._windows(part, self.samples, self.length, f"calibration:{seed}")

    def validation(self, seed: int = 0) -> Windows:
        """Documents to choose settings on, as many as a pilot has.

        Args:
            seed: decides documents and places. Default 0.
        """
        return self._windows("validation", self.documents_pilot, self.tokens, f"validation:{seed}")

    def documents(self, stage: Stage, base: int = 0) -> Windows:
        """What every run of a stage is measured on.

        Args:
            stage: pilots have documents of their own; while tuning it is those of `validation`.
            base: another seed base gives other documents of the set, and other places in them.
        """
        if stage == "tuning":
            return self.validation(base)
        if stage == "pilot":
            return self._windows("pilot", self.documents_pilot, self.tokens, f"pilot:{base}")
        return self._windows("evaluation", self.documents_run, self.tokens, f"evaluation:{base}")

    def _windows(self, part: Part, count: int, length: int, key: str) -> Windows:
        prefix, suffix = special_affixes(self.load().tokenizer)
        inner = length - len(prefix) - len(suffix)
        long_enough = [(name, ids) for name, ids in _tokens(self.model, self.texts, part) if len(ids) >= inner]
        if len(long_enough) < count:
            raise IntaglioError(
                f"the texts {self.texts!r} have {len(long_enough)} {part} documents of {length} tokens; {count} are"
                " needed"
            )
        drawn = sorted(long_enough, key=lambda document: keyed(key, document[0]))[:count]
        rows = [prefix + _cut(ids, inner, keyed(f"{key}:place", name)) + suffix for name, ids in drawn]
        return Windows(Segments.of(rows), tuple(name[:12] for name, _ in drawn))


def _cut(ids: Sequence[int], length: int, draw: int) -> list[int]:
    start = draw % (len(ids) - length + 1)
    return list(ids[start : start + length])


@lru_cache(maxsize=1)
def _load(model: str) -> Checkpoint:
    checkpoint = load(model)
    if checkpoint.tokenizer is None:
        raise IntaglioError(f"the model {model!r} has no tokenizer, so no text can be measured")
    return checkpoint


@lru_cache(maxsize=4)
def _sealed(texts: str, part: Part) -> Corpus:
    corpus = load_texts(texts)
    low, high = BOUNDS[part]
    pairs = zip(corpus.documents, corpus.hashes, strict=True)
    return Corpus(f"{texts} ({part})", tuple(d for d, h in pairs if low <= int(h[:8], 16) % 1000 < high))


@lru_cache(maxsize=4)
def _tokens(model: str, texts: str, part: Part) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Each document's hash and token ids, without special ones."""
    tokenizer, corpus = _load(model).tokenizer, _sealed(texts, part)
    return tuple(
        (name, tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
        for name, text in zip(corpus.hashes, corpus.documents, strict=True)
    )
