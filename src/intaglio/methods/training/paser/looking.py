"""What is found out about samples before any is chosen: which say the same, and what concepts they speak of."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress
from intaglio.methods.training.paser.concepts import key_phrases, merged
from intaglio.methods.training.paser.samples import Sample
from intaglio.methods.training.paser.vectors import vectors


def check_installed() -> None:
    """Refuse to begin without what clusters.

    Raises:
        IntaglioError: scikit-learn or scipy is missing.
    """
    if find_spec("sklearn") is None or find_spec("scipy") is None:
        raise IntaglioError("paser needs scikit-learn and scipy: pip install 'intaglio[select]'")


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long a block takes.

    Args:
        seconds: receives it.
        name: of the block.
    """
    begun = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begun


def first_alike(samples: Sequence[Sample]) -> list[int]:
    """Of each sample, the first one that says the same but for white space.

    Args:
        samples: any.
    """
    place: dict[str, int] = {}
    return [place.setdefault(" ".join(sample.words.split()), n) for n, sample in enumerate(samples)]


def concepts_of(
    samples: Sequence[Sample], most: int | None, synonyms: float | None, embedding: str, progress: Progress
) -> list[list[str]]:
    """The key phrases of each sample, those that mean the same made one.

    Args:
        samples: any.
        most: phrases of a sample; None: all.
        synonyms: cosine from which two phrases are one; None: only equal ones are.
        embedding: of phrases, see `vectors`.
        progress: called while phrases are embedded.
    """
    found = [key_phrases(sample.words, most) for sample in samples]
    phrases = list(dict.fromkeys(phrase for one in found for phrase in one))
    if synonyms is None or not phrases:
        return found
    stands = merged(phrases, vectors(phrases, embedding, progress=progress), synonyms)
    return [list(dict.fromkeys(stands[phrase] for phrase in one)) for one in found]
