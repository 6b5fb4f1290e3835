"""Corpora of documents from a bundled name, a file, a folder, the hub or a list.

A document is identified by the hash of its words, so that the split into training and held-out texts does not depend on
the order or the rest of the corpus.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from intaglio.data import assets
from intaglio.data.python_source import STANDARD_LIBRARY, source_files
from intaglio.environment import silence_loggers
from intaglio.errors import IntaglioError, did_you_mean

DOCUMENT_CHARACTERS = 2000
"""Approximate characters of a document cut from a text file."""

_BLANK_LINES = re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)*\n")
_DATASET_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.-]+(?:\[[\w%:-]*\])?))?")
_TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".csv", ".tsv", ".html", ".xml", ".tex"})


def document_hash(document: str) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of a document with white space collapsed."""
    return hashlib.sha256(" ".join(document.split()).encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """An ordered set of documents.

    Blank and duplicate documents (by hash) are dropped.

    Args:
        name: origin of the documents as the user wrote it, for reports and errors.
        documents: the texts, in order.

    Attributes:
        hashes: the hash of each document, in order; see `document_hash`.

    Raises:
        IntaglioError: a document holds a lone surrogate, which UTF-8 cannot encode.
    """

    name: str
    documents: tuple[str, ...]
    hashes: tuple[str, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        first: dict[str, str] = {}
        for number, document in enumerate(self.documents, 1):
            if not document.strip():
                continue
            try:
                first.setdefault(document_hash(document), document)
            except UnicodeEncodeError:
                raise IntaglioError(
                    f"document {number} of the texts {self.name!r} holds half a character (a lone surrogate); only text"
                    " that UTF-8 can hold is accepted"
                ) from None
        object.__setattr__(self, "documents", tuple(first.values()))
        object.__setattr__(self, "hashes", tuple(first))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the sorted hashes: equal exactly when two corpora hold the same documents in any order."""
        return hashlib.sha256("\n".join(sorted(self.hashes)).encode("ascii")).hexdigest()

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.documents)

    def _where(self, name: str, keep: Callable[[str], bool]) -> Corpus:
        return Corpus(name, tuple(d for d, h in zip(self.documents, self.hashes, strict=True) if keep(h)))

    def split(self, share_held_out: float = 0.2) -> tuple[Corpus, Corpus]:
        """Return (train, held_out): a document is held out when its hash modulo 1000 is below 1000 * share.

        Args:
            share_held_out: the expected share of the documents that is held out, between 0 and 1. Default 0.2.

        Raises:
            IntaglioError: the share is not strictly between 0 and 1.
        """
        if not 0 < share_held_out < 1:
            raise IntaglioError(f"share_held_out is {share_held_out}; it must lie between 0 and 1")
        bound = round(1000 * share_held_out)

        def held_out(digest: str) -> bool:
            return int(digest[:8], 16) % 1000 < bound

        train = self._where(f"{self.name} (train)", lambda digest: not held_out(digest))
        return train, self._where(f"{self.name} (held out)", held_out)

    def without(self, hashes: Collection[str]) -> Corpus:
        """Return the corpus without the documents of these hashes; it may be empty."""
        dropped = frozenset(hashes)
        return self._where(self.name, lambda digest: digest not in dropped)


def calibration_and_held_out(calibration: Corpus, evaluation: Corpus) -> tuple[Corpus, Corpus]:
    """Return disjoint calibration and evaluation texts.

    If both corpora hold the same documents, the corpus is split by document hash (`Corpus.split`). Otherwise the
    evaluation texts lose the documents that are also calibration texts.
    """
    if calibration.digest == evaluation.digest:
        train, held_out = calibration.split()
        if not len(train) or not len(held_out):
            raise IntaglioError(
                f"the texts {calibration.name!r} have too few documents ({len(calibration)}) to be split into"
                " calibration and held-out texts; give more documents or separate evaluation texts"
            )
        return train, held_out
    if not len(calibration):
        raise IntaglioError(f"the calibration texts {calibration.name!r} are empty; give at least one document")
    held_out = evaluation.without(calibration.hashes)
    if not len(held_out):
        raise IntaglioError(
            f"every document of the evaluation texts {evaluation.name!r} is also in the calibration texts"
            f" {calibration.name!r}; give evaluation texts of their own"
        )
    return calibration, held_out


def load_texts(source: str | os.PathLike[str] | Sequence[str] | Corpus, field: str = "text") -> Corpus:
    """Return the documents of a source.

    Args:
        source: one of
            - a bundled name (`wikipedia`; see `intaglio assets`), or `stdlib`, the files of Python's standard library;
            - a text file, cut at blank lines into documents of about 2,000 characters (never inside a paragraph);
            - a `.jsonl` file, one JSON object with `field` per line; or a `.json` file, a list of strings or objects;
            - a folder: each UTF-8 text file below it is a document, in the order of the sorted paths (hidden files and
              folders and files that are not UTF-8 text are skipped);
            - a data set of the Hugging Face hub, `user/name` or `user/name:split` (default split `train`; a part of
              one is written `user/name:train[:1000]`);
            - a sequence of strings, one document each; or a `Corpus`, returned unchanged.
        field: the name of the text in JSON objects and in a data set's rows. Default "text".

    Raises:
        IntaglioError: the source does not exist, is not text, or holds no document.
    """
    if isinstance(source, Corpus):
        return source
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        corpus = Corpus(name, tuple(_read(name, field)))
    elif isinstance(source, Sequence):
        corpus = Corpus("list of strings", tuple(_strings(source)))
    else:
        raise IntaglioError(f"texts is {type(source).__name__}; accepted: a name, a path, a list of strings, a Corpus")
    if not len(corpus):
        raise IntaglioError(f"the texts {corpus.name!r} hold no document; give at least one that is not blank")
    return corpus


def check_texts(source: str, documents: Iterable[str] | None = None) -> None:
    """Refuse texts that are missing, unreadable or empty; a data set of the hub is not opened.

    `documents` (default: as `load_texts` reads them) are read to the first that is not blank.
    """
    if _hub_match(source):
        return
    if not any(document.strip() for document in (_read(source, "text") if documents is None else documents)):
        raise IntaglioError(f"the texts {source!r} hold no document; give at least one that is not blank")


def _strings(source: Sequence[str]) -> Iterator[str]:
    for index, document in enumerate(source):
        if not isinstance(document, str):
            raise IntaglioError(f"texts[{index}] is {type(document).__name__}; every text must be a string")
        yield document


def _read(name: str, field: str) -> Iterator[str]:
    bundled = [asset.name for asset in assets.ASSETS.values() if asset.kind == "texts"]
    path = Path(name).expanduser()
    if name == STANDARD_LIBRARY:
        return (file.text for file in source_files())
    if name in bundled:
        return _from_jsonl(assets.path(name) / "texts.jsonl", "text")
    if not name.strip():
        raise IntaglioError("the name of the texts is empty; accepted: a bundled name, a file, a folder, user/name")
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        readers = {".jsonl": _from_jsonl, ".json": _from_json}
        reader = readers.get(path.suffix.lower())
        return reader(path, field) if reader else _from_text(path)
    if path.exists():
        raise IntaglioError(f"the texts {name!r} are neither a regular file nor a folder")
    if match := _hub_match(name):
        return from_hub(match["id"], match["split"] or "train", field)
    known = did_you_mean(name, [*bundled, STANDARD_LIBRARY])
    raise IntaglioError(f"the texts {name!r} are no file, no folder and no bundled name: {known}")


def _hub_match(name: str) -> re.Match[str] | None:
    """Match the name of a data set of the hub; a path may look like one."""
    match = _DATASET_ID.fullmatch(name)
    plausible = match and Path(match["id"]).suffix.lower() not in _TEXT_SUFFIXES and not name.startswith(".")
    return match if plausible and not Path(name).expanduser().exists() else None


def _text_of(path: Path) -> str:
    """Return a file's text with newlines as line ends, or a sentence on where it is not UTF-8."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise IntaglioError(f"cannot read the texts {path}: {error.strerror}") from error
    nul = content.find(b"\0")
    if nul >= 0:
        raise IntaglioError(f"the texts {path} are binary (a zero byte at offset {nul}); only UTF-8 text is accepted")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntaglioError(f"the texts {path} are not UTF-8 (byte offset {error.start}); convert them first") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def cut_at_blank_lines(text: str, characters: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Yield runs of whole paragraphs, each as long as fits in `characters`; longer paragraphs stay whole."""
    gaps = [match.span() for match in _BLANK_LINES.finditer(text)]
    starts = [0, *(stop for _, stop in gaps)]
    ends = [*(start for start, _ in gaps), len(text)]
    piece_start, piece_end = 0, ends[0]
    for start, end in zip(starts[1:], ends[1:], strict=True):
        if end - piece_start > characters:
            yield text[piece_start:piece_end].strip("\n")
            piece_start = start
        piece_end = end
    yield text[piece_start:piece_end].strip("\n")


def _from_text(path: Path) -> Iterator[str]:
    return cut_at_blank_lines(_text_of(path))


def _from_folder(folder: Path) -> Iterator[str]:
    files = []
    for directory, below, names in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        files += [Path(directory, name) for name in names if not name.startswith(".")]
    for path in sorted(files, key=lambda file: file.relative_to(folder).as_posix()):
        if path.is_file() and _is_text(path):
            yield _text_of(path)


def _is_text(path: Path) -> bool:
    try:
        content = path.read_bytes()
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    except OSError as error:
        raise IntaglioError(f"cannot read the texts {path}: {error.strerror}") from error
    return b"\0" not in content


_JSON_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}


def _text_under(value: Any, field: str, location: str) -> str:
    if not isinstance(value, dict):
        kind = _JSON_NAMES.get(type(value), "a number")
        raise IntaglioError(f"{location} is {kind}; an object with the field {field!r} is accepted")
    if field not in value:
        names = ", ".join(sorted(value)[:8]) or "nothing"
        raise IntaglioError(f"{location} has no field {field!r}; it has: {names}")
    text = value[field]
    if not isinstance(text, str):
        kind = _JSON_NAMES.get(type(text), "a number")
        raise IntaglioError(f"the field {field!r} of {location} is {kind}; only a string is accepted")
    return text


def _from_jsonl(path: Path, field: str) -> Iterator[str]:
    # Not splitlines(): it also splits at separators that JSON allows inside a string.
    return parse_jsonl(_text_of(path).split("\n"), path, field)


def parse_jsonl(lines: Iterable[str], path: Path, field: str) -> Iterator[str]:
    """Yield the text of each JSON line that is not blank."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        location = f"line {number} of {path}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise IntaglioError(f"{location} is not JSON: {error}") from None
        yield _text_under(value, field, location)


def _from_json(path: Path, field: str) -> Iterator[str]:
    try:
        values = json.loads(_text_of(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise IntaglioError(f"the texts {path} are not JSON: {error}") from None
    if not isinstance(values, list):
        kind = _JSON_NAMES.get(type(values), "a number")
        raise IntaglioError(f"the texts {path} are {kind}; a list of strings or of objects is accepted")
    for index, value in enumerate(values):
        yield value if isinstance(value, str) else _text_under(value, field, f"item {index} of {path}")


def from_hub(name: str, split: str, field: str, *, streaming: bool = False) -> Iterator[str]:
    """Yield the texts of a data set of the Hugging Face hub."""
    for number, row in enumerate(hub_rows(name, split, field, streaming=streaming)):
        yield _text_under(row, field, f"row {number} of the data set {name!r}")


def hub_rows(name: str, split: str, field: str | None = None, *, streaming: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set of the Hugging Face hub, which must have `field` if one is given."""
    try:
        import datasets  # optional, and slow to import
    except ImportError:
        raise IntaglioError(
            f"the texts {name!r} are not a file or folder here, and a data set of that name needs the package datasets:"
            " pip install 'intaglio[datasets]'"
        ) from None
    try:
        with silence_loggers("datasets", "huggingface_hub"):
            rows = datasets.load_dataset(name, split=split, streaming=streaming)
        columns = getattr(rows, "column_names", None)  # None for some streams
        if field is not None and columns is not None and field not in columns:
            raise IntaglioError(f"the data set {name!r} has no field {field!r}; it has: {', '.join(columns)}")
        yield from rows
    except IntaglioError:
        raise
    except Exception as error:
        # datasets raises many types (no network, no such name or split, a broken file), all alike to a user.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise IntaglioError(
            f"the texts {name!r} are not a file or folder here, and the data set of that name, split {split!r}, cannot"
            f" be loaded: {reason}"
        ) from error
