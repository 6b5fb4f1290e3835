"""Docstring retrieval: a docstring's first paragraph asks for the code, or the text, that it is the summary of.

The source is the standard library's and that of packages that Intaglio depends on, so it is there without a download.
Modules are sealed by the hash of their name: no module is in two sets. Of pairs with the same summary or the same
document in any set, one is kept.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from intaglio import atomic_io
from intaglio.data.docstrings import Kind, Pair, pairs, words
from intaglio.data.python_source import source_files, sources_digest
from intaglio.data.texts import Corpus
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.evidence.experiment import Stage
from intaglio.evidence.worlds.made import code_of, made
from intaglio.evidence.worlds.sealing import MEASURED, Bounds, Part, check_part, draw, keyed, part_of

BOUNDS: Bounds = {"train": (0, 600), "validation": (600, 700), "pilot": (700, 800), "evaluation": (800, 1000)}
"""Which remainders of a module's hash are in which set."""
_FILE = "pairs.jsonl"


@dataclass(frozen=True)
class Retrieval:
    """What a retriever is measured on, in the form that retrieval metrics take.

    Args:
        queries: `{id: text}`.
        documents: `{id: text}`; those of all queries, and others.
        relevant: `{query's id: {document's id: 1}}`; one document for each query.
    """

    queries: dict[str, str]
    documents: dict[str, str]
    relevant: dict[str, dict[str, int]]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything in it, in its order."""
        text = json.dumps([self.queries, self.documents, self.relevant], ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Docstrings:
    """The world: which source, and how much of it is used.

    Args:
        learned: packages that training pairs are from. Default SymPy and PyTorch.
        asked: packages that retrieval is measured on; the same as `learned` measures at home. Default NumPy and the
            standard library.
        document: `text`, the docstring after its summary (default), or `code`, the function without docstrings.
        training_pairs: of a draw. Default 3000.
        queries_run: of a run. Default 200.
        queries_pilot: of the pilot, and of validation. Default 100.
        documents_run: that a query of a run is searched in. Default 400.
        documents_pilot: of the pilot, and of validation. Default 200.

    Raises:
        IntaglioError: `document` is unknown, or there are fewer documents than queries.
    """

    learned: tuple[str, ...] = ("sympy", "torch")
    asked: tuple[str, ...] = ("numpy", "stdlib")
    document: Kind = "text"
    training_pairs: int = 3000
    queries_run: int = 200
    queries_pilot: int = 100
    documents_run: int = 400
    documents_pilot: int = 200

    def __post_init__(self) -> None:
        if self.document not in ("code", "text"):
            raise IntaglioError(f"document is {self.document!r}; {did_you_mean(self.document, ('code', 'text'))}")
        for stage in ("run", "pilot"):
            queries, documents = getattr(self, f"queries_{stage}"), getattr(self, f"documents_{stage}")
            if not 1 <= queries <= documents:
                raise IntaglioError(
                    f"queries_{stage} is {queries}; from 1 to documents_{stage} ({documents}) is accepted"
                )

    @property
    def digest(self) -> str:
        """SHA-256 of all pairs: another version of Python or of a package changes it."""
        found = _collected(tuple(sorted({*self.learned, *self.asked})), self.document)
        return hashlib.sha256("\n".join(pair.id for pair in found).encode("ascii")).hexdigest()

    def pairs(self, part: Part, packages: Sequence[str] | None = None) -> tuple[Pair, ...]:
        """All pairs of a sealed set.

        Args:
            part: which.
            packages: only theirs. Default: those learned from for `train`, and those asked about for the others.
        """
        check_part(part, BOUNDS)
        wanted = packages if packages is not None else self.learned if part == "train" else self.asked
        everything = _collected(tuple(sorted({*self.learned, *self.asked})), self.document)
        return tuple(pair for pair in everything if pair.package in wanted and part_of(pair.module, BOUNDS) == part)

    def training(self, seed: int) -> tuple[Pair, ...]:
        """Training pairs, in an order that the seed decides.

        Args:
            seed: decides pairs and order.

        Raises:
            IntaglioError: there are fewer than `training_pairs`.
        """
        found = self.pairs("train")
        places = draw(f"docstrings train:{seed}", [p.id for p in found], self.training_pairs, "training pairs")
        return tuple(found[place] for place in places)

    def texts(self) -> Corpus:
        """The documents of all training pairs, for models that read before they search; no summary is in them."""
        return Corpus("docstrings (train)", tuple(pair.document for pair in self.pairs("train")))

    def validation(self, seed: int = 0) -> Retrieval:
        """Queries to choose settings on.

        Args:
            seed: decides queries and documents. Default 0.
        """
        return self._drawn("validation", self.queries_pilot, self.documents_pilot, seed)

    def retrieval(self, stage: Stage, base: int = 0, packages: Sequence[str] | None = None) -> Retrieval:
        """What every run of a stage is measured on.

        Args:
            stage: pilots have modules of their own.
            base: another seed base gives other queries and documents of the set.
            packages: only theirs; `world.learned` measures at home. Default: those asked about.
        """
        sizes = (self.queries_run, self.documents_run) if stage == "run" else (self.queries_pilot, self.documents_pilot)
        return self._drawn(MEASURED[stage], *sizes, base, packages)

    def _drawn(
        self, part: Part, queries: int, documents: int, seed: int, packages: Sequence[str] | None = None
    ) -> Retrieval:
        found = self.pairs(part, packages)
        places = draw(f"docstrings {part}:{seed}", [p.id for p in found], documents, f"{part} documents")
        chosen = [found[place] for place in places]
        return Retrieval(
            queries={f"q{pair.id}": pair.query for pair in chosen[:queries]},
            documents={f"d{pair.id}": pair.document for pair in sorted(chosen, key=lambda pair: pair.id)},
            relevant={f"q{pair.id}": {f"d{pair.id}": 1} for pair in chosen[:queries]},
        )


@lru_cache(maxsize=4)
def _collected(packages: tuple[str, ...], kind: Kind) -> tuple[Pair, ...]:
    """The pairs of some packages, without duplicates, in the order of their ids."""
    everything = sorted((pair for package in packages for pair in _found(package, kind)), key=lambda pair: pair.id)
    queries, documents, kept = set(), set(), []
    # Which one of several stays follows from its place in the source alone.
    for pair in sorted(everything, key=lambda pair: keyed("docstrings", f"{pair.module} {pair.name} {pair.id}")):
        query, document = words(pair.query), words(pair.document)
        if query not in queries and document not in documents:
            kept.append(pair)
        queries.add(query)
        documents.add(document)
    return tuple(sorted(kept, key=lambda pair: pair.id))


@lru_cache(maxsize=16)
def _found(package: str, kind: Kind) -> tuple[Pair, ...]:
    """The pairs of a package; parsing a large one takes 15 seconds, so they are kept in the cache."""
    files = source_files((package,))
    choices = {
        "package": package,
        "kind": kind,
        "files": sources_digest(files),
        "python": list(sys.version_info[:2]),
        "code": code_of("intaglio.data.docstrings"),
    }

    def make(target: Path, scratch: Path) -> None:
        lines = [json.dumps(asdict(pair)) + "\n" for pair in pairs(files, kind)]
        atomic_io.write_text(target / _FILE, "".join(lines))

    text = (made(f"docstrings-{package}-{kind}", choices, make) / _FILE).read_text(encoding="utf-8")
    return tuple(Pair(**json.loads(line)) for line in text.splitlines())
