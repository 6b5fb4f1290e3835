"""Docstring retrieval: the first paragraph of a docstring is the query for the code, or the text, that it summarises.

The source is the standard library's and that of packages that Intaglio depends on, so no download is needed. Modules
are split by the hash of their name. Of pairs with the same summary or document in any set, one is kept.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar

from intaglio import atomic_io
from intaglio.data.docstrings import Kind, Pair, pairs, words
from intaglio.data.python_source import source_files, sources_digest
from intaglio.evidence.testbeds.cache import cached
from intaglio.evidence.testbeds.splits import Part, Sized, check_part, draw, keyed, part_of

_FILE = "pairs.jsonl"


@dataclass(frozen=True)
class Retrieval:
    """Queries, documents and relevance `{query id: {document id: 1}}`, one document a query."""

    queries: dict[str, str]
    documents: dict[str, str]
    relevant: dict[str, dict[str, int]]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything, in its order."""
        text = json.dumps([self.queries, self.documents, self.relevant], ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Docstrings(Sized):
    """Source packages and the number of pairs.

    Training pairs are from `training_packages`; `evaluation_packages` are searched. A document is the docstring after
    its summary (`text`) or the function without docstrings (`code`).
    """

    training_packages: tuple[str, ...] = ("sympy", "torch")
    evaluation_packages: tuple[str, ...] = ("numpy", "stdlib")
    document: Kind = "text"
    training_pairs: int = 3000
    queries_run: int = 200
    queries_pilot: int = 100
    documents_run: int = 400
    documents_pilot: int = 200
    MINIATURE: ClassVar = {"training_packages": ("jinja2",), "evaluation_packages": ("jinja2",), "document": "code",
                           "training_pairs": 20, "queries_run": 8, "queries_pilot": 4, "documents_run": 10,
                           "documents_pilot": 4}  # fmt: skip

    @property
    def digest(self) -> str:
        """SHA-256 of all pairs."""
        return hashlib.sha256("\n".join(pair.id for pair in self._every()).encode("ascii")).hexdigest()

    def _every(self) -> tuple[Pair, ...]:
        return _collected(tuple(sorted({*self.training_packages, *self.evaluation_packages})), self.document)

    def pairs(self, part: Part) -> tuple[Pair, ...]:
        """Return all pairs of a set."""
        check_part(part)
        wanted = self.training_packages if part == "train" else self.evaluation_packages
        return tuple(pair for pair in self._every() if pair.package in wanted and part_of(pair.module) == part)

    def training(self, seed: int) -> tuple[Pair, ...]:
        """Return random training pairs."""
        every = self.pairs("train")
        chosen = draw(f"docstrings train:{seed}", [pair.id for pair in every], self.training_pairs, "training pairs")
        return tuple(every[index] for index in chosen)

    def retrieval(self, part: Part, base: int = 0) -> Retrieval:
        """Return the queries and documents of a set that every run is measured on; another base draws others."""
        kind = "run" if part == "evaluation" else "pilot"
        every = self.pairs(part)
        count = getattr(self, f"documents_{kind}")
        chosen = draw(f"docstrings {part}:{base}", [pair.id for pair in every], count, f"{part} documents")
        pairs = [every[index] for index in chosen]
        queried = pairs[: getattr(self, f"queries_{kind}")]
        return Retrieval(
            queries={f"q{pair.id}": pair.query for pair in queried},
            documents={f"d{pair.id}": pair.document for pair in sorted(pairs, key=lambda pair: pair.id)},
            relevant={f"q{pair.id}": {f"d{pair.id}": 1} for pair in queried},
        )


@lru_cache(maxsize=4)
def _collected(packages: tuple[str, ...], kind: Kind) -> tuple[Pair, ...]:
    """Return the pairs of some packages, without duplicates, in the order of their ids."""
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
    """Return the pairs of a package; parsing a large one takes 15 seconds, so they are cached."""
    files = source_files((package,))
    choices = {"package": package, "kind": kind, "files": sources_digest(files), "python": list(sys.version_info[:2])}

    def build(target: Path, scratch: Path) -> None:
        lines = [json.dumps(asdict(pair)) + "\n" for pair in pairs(files, kind)]
        atomic_io.write_text(target / _FILE, "".join(lines))

    text = (cached(f"docstrings-{package}-{kind}", choices, build) / _FILE).read_text(encoding="utf-8")
    return tuple(Pair(**json.loads(line)) for line in text.splitlines())
