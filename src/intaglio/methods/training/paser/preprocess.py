"""Preprocessing of samples: duplicates and concepts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress
from intaglio.methods.training.paser.concepts import key_phrases, merge_synonyms
from intaglio.methods.training.paser.embeddings import embed
from intaglio.trainer.tokenised_samples import Sample


def check_installed() -> None:
    """Refuse to start without scikit-learn and scipy."""
    if find_spec("sklearn") is None or find_spec("scipy") is None:
        raise IntaglioError("paser needs scikit-learn and scipy: pip install 'intaglio[select]'")


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Record the duration of a block."""
    begun = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begun


def first_duplicates(samples: Sequence[Sample]) -> list[int]:
    """Return for each sample the index of the first with the same text up to white space."""
    first_index: dict[str, int] = {}
    return [first_index.setdefault(" ".join(sample.words.split()), n) for n, sample in enumerate(samples)]


def extract_concepts(
    samples: Sequence[Sample], most: int | None, synonyms: float | None, embedding: str, progress: Progress
) -> list[list[str]]:
    """Return the key phrases of each sample, with synonyms merged."""
    phrases_of = [key_phrases(sample.words, most) for sample in samples]
    phrases = list(dict.fromkeys(phrase for one in phrases_of for phrase in one))
    if synonyms is None or not phrases:
        return phrases_of
    representative = merge_synonyms(phrases, embed(phrases, embedding, progress=progress), synonyms)
    return [list(dict.fromkeys(representative[phrase] for phrase in one)) for one in phrases_of]
