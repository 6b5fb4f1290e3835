"""Docstring retrieval: the first paragraph of a docstring is the query for the code, or the text, that it summarises.

The source is the standard library's and that of packages that Intaglio depends on, so no download is needed. Modules
are split by the hash of their name. Of pairs with the same summary or document in any set, one is kept.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from intaglio import atomic_io
from intaglio.data.docstrings import Kind, Pair, pairs, words
from intaglio.data.python_source import source_files, sources_digest
from intaglio.data.texts import Corpus
from intaglio.evidence.testbeds.cache import cached
from intaglio.evidence.testbeds.splits import Part, check_part, draw, keyed, part_of

_FILE = "pairs.jsonl"


@dataclass(frozen=True)
class Retrieval:
    """Queries, documents and relevance judgements, as retrieval metrics take them.

    Args:
        relevant: `{query id: {document id: 1}}`, one document a query.
    """

    queries: dict[str, str]
    documents: dict[str, str]
    relevant: dict[str, dict[str, int]]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything, in its order."""
        text = json.dumps([self.queries, self.documents, self.relevant], ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Docstrings:
    """Source packages and the number of pairs.

    Args:
        learned: packages of the training pairs. Default SymPy and PyTorch.
        asked: packages that retrieval is measured on; equal to `learned` for in-domain retrieval. Default NumPy and the
            standard library.
        document: `text`, the docstring after its summary (default), or `code`, the function without docstrings.
    """

    learned: tuple[str, ...] = ("sympy", "torch")
    asked: tuple[str, ...] = ("numpy", "stdlib")
    document: Kind = "text"
    training_pairs: int = 3000
    queries_run: int = 200
    queries_pilot: int = 100
    documents_run: int = 400
    documents_pilot: int = 200

    def toy(self, **changes: Any) -> Docstrings:
        """Return the test bed in miniature, on a small package."""
        sizes = {"training_pairs": 20, "queries_run": 8, "queries_pilot": 4, "documents_run": 10, "documents_pilot": 4}
        return replace(self, **{"learned": ("jinja2",), "asked": ("jinja2",), "document": "code", **sizes, **changes})

    @property
    def digest(self) -> str:
        """SHA-256 of all pairs."""
        every = _collected(tuple(sorted({*self.learned, *self.asked})), self.document)
        return hashlib.sha256("\n".join(pair.id for pair in every).encode("ascii")).hexdigest()

    def pairs(self, part: Part, packages: Sequence[str] | None = None) -> tuple[Pair, ...]:
        """Return all pairs of a set; by default of `learned` for `train`, of `asked` for the others."""
        check_part(part)
        wanted = packages if packages is not None else self.learned if part == "train" else self.asked
        every = _collected(tuple(sorted({*self.learned, *self.asked})), self.document)
        return tuple(pair for pair in every if pair.package in wanted and part_of(pair.module) == part)

    def training(self, seed: int) -> tuple[Pair, ...]:
        """Return random training pairs."""
        every = self.pairs("train")
        chosen = draw(f"docstrings train:{seed}", [pair.id for pair in every], self.training_pairs, "training pairs")
        return tuple(every[index] for index in chosen)

    def texts(self) -> Corpus:
        """Return the documents of all training pairs, for pretraining; they contain no summary."""
        return Corpus("docstrings (train)", tuple(pair.document for pair in self.pairs("train")))

    def retrieval(self, part: Part, base: int = 0, packages: Sequence[str] | None = None) -> Retrieval:
        """Return the queries and documents of a set that every run is measured on.

        Args:
            part: the set.
            base: another base draws others. Default 0.
        """
        kind = "run" if part == "evaluation" else "pilot"
        every = self.pairs(part, packages)
        count = getattr(self, f"documents_{kind}")
        chosen = draw(f"docstrings {part}:{base}", [pair.id for pair in every], count, f"{part} documents")
        pairs = [every[index] for index in chosen]
        asked = pairs[: getattr(self, f"queries_{kind}")]
        return Retrieval(
            queries={f"q{pair.id}": pair.query for pair in asked},
            documents={f"d{pair.id}": pair.document for pair in sorted(pairs, key=lambda pair: pair.id)},
            relevant={f"q{pair.id}": {f"d{pair.id}": 1} for pair in asked},
        )


@lru_cache(maxsize=4)
def _collected(packages: tuple[str, ...], kind: Kind) -> tuple[Pair, ...]:
    """The pairs of some packages, without duplicates, in the order of their ids."""
    everything = sorted((pair for package in packages for pair in _of_package(package, kind)), key=lambda p: p.id)
    queries, documents, kept = set(), set(), []
    # Which of several duplicates stays follows from its place in the source alone.
    for pair in sorted(everything, key=lambda pair: keyed("docstrings", f"{pair.module} {pair.name} {pair.id}")):
        query, document = words(pair.query), words(pair.document)
        if query not in queries and document not in documents:
            kept.append(pair)
        queries.add(query)
        documents.add(document)
    return tuple(sorted(kept, key=lambda pair: pair.id))


@lru_cache(maxsize=16)
def _of_package(package: str, kind: Kind) -> tuple[Pair, ...]:
    """The pairs of a package; parsing a large one takes 15 seconds, so they are cached."""
    files = source_files((package,))
    choices = {
        "package": package,
        "kind": kind,
        "files": sources_digest(files),
        "python": list(sys.version_info[:2]),
    }

    def build(target: Path, scratch: Path) -> None:
        lines = [json.dumps(asdict(pair)) + "\n" for pair in pairs(files, kind)]
        atomic_io.write_text(target / _FILE, "".join(lines))

    text = (cached(f"docstrings-{package}-{kind}", choices, build) / _FILE).read_text(encoding="utf-8")
    return tuple(Pair(**json.loads(line)) for line in text.splitlines())
