"""Streamed texts, for corpora larger than memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from intaglio.data.texts import (
    DOCUMENT_CHARACTERS,
    _from_folder,
    document_hash,
    from_hub,
    load_texts,
    parse_jsonl,
)
from intaglio.errors import IntaglioError


@dataclass(frozen=True)
class TextStream:
    """Documents in their order, one in memory at a time; can be iterated any number of times.

    A `.jsonl` file is read line by line (a `text` in each object), any other text file paragraph by paragraph, a folder
    file by file; a data set of the Hugging Face hub is streamed. Blank documents are skipped, duplicates are not.

    Args:
        source: a file, a folder or `user/name[:split]`.
        without: hashes of documents to skip; see `document_hash`.

    Raises:
        IntaglioError: while reading: nothing is there, or it is not text.
    """

    source: str
    without: Collection[str] = frozenset()

    def __iter__(self) -> Iterator[str]:
        """Start a pass."""
        dropped = frozenset(self.without)
        for document in _documents(self.source):
            if document.strip() and not (dropped and document_hash(document) in dropped):
                yield document


def _documents(source: str) -> Iterator[str]:
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _from_folder(path)
    elif path.is_file() and path.suffix.lower() == ".json":
        raise IntaglioError(f"the texts {source!r} are a JSON list, which is read whole; a .jsonl file can be streamed")
    elif path.is_file():
        jsonl = path.suffix.lower() == ".jsonl"
        yield from parse_jsonl(_lines(path), path, "text") if jsonl else _paragraphs(path)
    elif "/" in source and not path.exists():
        name, _, split = source.partition(":")
        yield from from_hub(name, split or "train", "text", streaming=True)
    else:
        yield from load_texts(source).documents  # a bundled name, or an error


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", newline=None) as file:
            yield from file
    except UnicodeDecodeError as error:
        raise IntaglioError(f"the texts {path} are not UTF-8 ({error.reason}); convert them first") from None
    except OSError as error:
        raise IntaglioError(f"cannot read the texts {path}: {error.strerror}") from error


def _paragraphs(path: Path) -> Iterator[str]:
    """Join paragraphs to the size of a document that is cut from a file in memory."""
    lines: list[str] = []
    size = 0
    for line in _lines(path):
        lines.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARACTERS and not line.strip():
            yield "".join(lines).strip("\n")
            lines, size = [], 0
    yield "".join(lines).strip("\n")
