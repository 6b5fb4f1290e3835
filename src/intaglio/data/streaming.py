"""Texts that are read as they are needed: corpora larger than memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from intaglio.data.texts import _from_folder, _text_under, document_hash, load_texts
from intaglio.errors import IntaglioError


@dataclass(frozen=True)
class TextStream:
    """Documents in their order, one in memory at a time; can be read any number of times.

    A `.jsonl` file is read line by line (a `text` in each object), any other text file paragraph by paragraph, a folder
    file by file; a name of the Hugging Face hub is streamed. Blank documents are passed over, repeated ones are not.

    Args:
        source: a file, a folder or `user/name[:split]`.
        without: hashes of documents that are passed over; see `document_hash`.

    Raises:
        IntaglioError: while reading: nothing is there, or it is no text.
    """

    source: str
    without: Collection[str] = frozenset()

    def __iter__(self) -> Iterator[str]:
        """Begin a pass."""
        dropped = frozenset(self.without)
        for document in _documents(self.source):
            if document.strip() and not (dropped and document_hash(document) in dropped):
                yield document


def _documents(source: str) -> Iterator[str]:
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _from_folder(path)
    elif path.is_file() and path.suffix.lower() == ".json":
        raise IntaglioError(
            f"the texts {source!r} are one JSON list, which is read whole; a .jsonl file can be streamed"
        )
    elif path.is_file():
        yield from (_lines if path.suffix.lower() == ".jsonl" else _paragraphs)(path)
    elif "/" in source and not path.exists():
        yield from _hub(source)
    else:
        yield from load_texts(source).documents  # a bundled name, or a sentence on what is wrong


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8", newline=None) as file:
            yield from enumerate(file, 1)
    except UnicodeDecodeError as error:
        raise IntaglioError(f"the texts {path} are not UTF-8 ({error.reason}); convert them first") from None
    except OSError as error:
        raise IntaglioError(f"cannot read the texts {path}: {error.strerror}") from error


def _lines(path: Path) -> Iterator[str]:
    for number, line in _numbered(path):
        if line.strip():
            place = f"line {number} of {path}"
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise IntaglioError(f"{place} is not JSON: {error}") from None
            yield _text_under(value, "text", place)


def _paragraphs(path: Path) -> Iterator[str]:
    """Paragraphs joined until they hold about as much as a document that is cut out of a file in memory."""
    from intaglio.data.texts import DOCUMENT_CHARACTERS

    held: list[str] = []
    size = 0
    for _, line in _numbered(path):
        held.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARACTERS and not line.strip():
            yield "".join(held).strip("\n")
            held, size = [], 0
    yield "".join(held).strip("\n")


def _hub(source: str) -> Iterator[str]:
    try:
        import datasets  # optional, and slow to import
    except ImportError:
        raise IntaglioError(
            f"the texts {source!r} are no file or folder here, and streaming a data set of that name needs the package"
            " datasets: pip install 'intaglio[datasets]'"
        ) from None
    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            yield _text_under(row, "text", f"row {number} of the data set {name!r}")
    except IntaglioError:
        raise
    except Exception as error:  # as for data sets that are read whole
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise IntaglioError(f"the data set {source!r} cannot be streamed: {reason}") from error
