"""Documents: readers of folders, files and data sets; chunks."""

from __future__ import annotations

import csv
import hashlib
import html.parser
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from intaglio.data import assets
from intaglio.data.texts import hub_rows
from intaglio.errors import IntaglioError, shorten

MAX_BYTES = 64 << 20
"""Most bytes of a file in a folder, or of a line: a document is held in memory."""
SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst", ".html", ".htm", ".py", ".pyi"})
"""Files that are read in a folder; others are skipped."""

_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.-]+(?:\[[\w%:-]*\])?))?")
_HEADING = {
    ".md": re.compile(r"^#+\s+(.+?)\s*#*$", re.M),
    ".rst": re.compile(r"^(\S.*)\n([=\-~#*^])\2{2,}$", re.M),
    ".py": re.compile(r'\A(?:\s*#.*\n)*\s*[rR]?(?:"""|\'\'\')\s*(\S.*?)(?:"""|\'\'\'|$)', re.M),
}
_HEADING |= {".markdown": _HEADING[".md"], ".pyi": _HEADING[".py"]}
_BREAKS = tuple(re.compile(pattern) for pattern in (r"\n[^\S\n]*\n\s*", r"\n", r"(?<=[.!?。])\s+", r"\s+"))
"""Ends of a chunk, the best first: blank lines, lines, sentences, words."""


@dataclass(frozen=True)
class Document:
    """A document to index.

    Args:
        id: unique in the index; the same id again is an update.
        text: its text.
        title: shown with hits; not searched. Default "".
        metadata: JSON values by field, for filters. Default none.
    """

    id: str
    text: str
    title: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def metadata_json(self) -> str:
        """The metadata as JSON with sorted keys."""
        try:
            return json.dumps(self.metadata, ensure_ascii=False, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise IntaglioError(f"the metadata of document {shorten(self.id)!r} cannot be stored: {error}") from None

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over all fields: equal documents are not indexed again."""
        return hashlib.sha256("\0".join((self.id, self.title, self.metadata_json, self.text)).encode()).digest()


def to_document(value: Document | Mapping[str, Any], where: str, text_field: str, id_field: str) -> Document:
    """Return a row of JSON, CSV or a data set as a document; further fields become metadata."""
    if not isinstance(value, Document):
        if not isinstance(value, Mapping):
            raise IntaglioError(f"{where} is no object; an object with the field {text_field!r} is accepted")
        if not isinstance(value.get(text_field), str):
            names = ", ".join(map(str, list(value)[:8])) or "nothing"
            has = "is not text" if text_field in value else f"is missing; it has: {names}"
            raise IntaglioError(f"the field {text_field!r} of {where} {has}")
        key = id_field if id_field in value else "_id" if "_id" in value else None
        text, title = value[text_field], value.get("title")
        identity = None if key is None else value[key]
        if key and (isinstance(identity, bool) or not isinstance(identity, (str, int)) or identity == ""):
            raise IntaglioError(f"the field {key!r} of {where} is {identity!r}; a string or an integer is accepted")
        rest = {str(name): item for name, item in value.items() if name not in (text_field, key, "title")}
        if key is None:
            identity = hashlib.sha256(f"{title or ''}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
        value = Document(str(identity), text, str(title or ""), rest)
    try:
        f"{value.id}{value.title}{value.text}{value.metadata_json}".encode()
    except UnicodeEncodeError:
        raise IntaglioError(f"{where} holds half a character (a lone surrogate); only UTF-8 text is accepted") from None
    return value


def read_documents(
    source: str | os.PathLike[str] | Iterable[Document | Mapping[str, Any]],
    *,
    text_field: str = "text",
    id_field: str = "id",
    skipped: list[str] | None = None,
) -> Iterator[Document]:
    """Yield the documents of a source, reading them as they are needed.

    Args:
        source: a folder (text, Markdown, reStructuredText, HTML, Python; the id is the relative path), a `.jsonl` or
            `.csv` file, another text file, a bundled name (`wikipedia`), `user/name[:split]` of the hub, or documents.
        text_field: the text's name in rows. Default "text".
        id_field: the id's name in rows; "_id" is accepted too. Default "id".
        skipped: receives a sentence for each file that is not read.

    Raises:
        IntaglioError: the source does not exist, or a row of it is malformed.
    """
    skipped = [] if skipped is None else skipped
    if not isinstance(source, (str, os.PathLike)):
        for number, value in enumerate(source, 1):
            yield to_document(value, f"document {number}", text_field, id_field)
        return
    name, path = os.fspath(source), Path(source).expanduser()
    if assets.ASSETS.get(name) and assets.ASSETS[name].kind == "texts" and not path.exists():
        path, text_field = assets.path(name) / "texts.jsonl", "text"
    if path.is_dir():
        yield from _from_folder(path, skipped)
        return
    if path.is_file():
        rows = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".tsv": _csv}.get(path.suffix.lower())
        if rows is None:
            yield _from_file(path, path.name)
            return
    elif not path.exists() and (match := _HUB.fullmatch(name)) and not name.startswith("."):
        split = match["split"] or "train"
        values = hub_rows(match["id"], split, streaming=True)
        for number, value in enumerate(values):
            where = f"row {number} of the data set {name!r}"
            yield to_document({"id": f"{split}/{number}", **value}, where, text_field, id_field)
        return
    else:
        raise IntaglioError(
            f"the documents {name!r} do not exist; accepted: a folder, a .jsonl, .csv or text file, or user/name of the"
            " hub"
        )
    for where, row in rows(path):
        yield to_document(row, where, text_field, id_field)


def _from_folder(folder: Path, skipped: list[str]) -> Iterator[Document]:
    count = 0
    for directory, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for path in (Path(directory, name) for name in sorted(names) if not name.startswith(".")):
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                continue
            count += 1
            try:
                yield _from_file(path, path.relative_to(folder).as_posix())
            except IntaglioError as error:
                skipped.append(str(error))
    if not count:
        accepted = ", ".join(sorted(SUFFIXES))
        raise IntaglioError(f"the folder {folder} holds no document; files that are read: {accepted}")


def _from_file(path: Path, identity: str) -> Document:
    """Return a file as a document, or raise a sentence on why it is none."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise IntaglioError(f"{path} has {size / 1e6:.0f} MB; files up to {MAX_BYTES >> 20} MiB are read: split it")
        content = path.read_bytes()
    except OSError as error:
        raise IntaglioError(f"{path} cannot be read: {error.strerror}") from error
    if (nul := content.find(b"\0")) >= 0:
        raise IntaglioError(f"{path} is binary (a zero byte at offset {nul})")
    text = _decode(content, str(path)).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    suffix = path.suffix.lower()
    if suffix in (".html", ".htm"):
        title, text = html_text(text)
    else:
        match = _HEADING[suffix].search(text) if suffix in _HEADING else None
        title = shorten(match[1].strip(), 200) if match else ""
    try:
        identity.encode()
    except UnicodeEncodeError:
        raise IntaglioError(f"{path} has a name that is not UTF-8") from None
    return Document(identity, text, title, {"path": identity, "type": suffix.removeprefix(".")})


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise IntaglioError(f"{where} is not UTF-8 (byte offset {error.start})") from None


class _HTMLText(html.parser.HTMLParser):
    """Collects the title and the text outside of scripts and styles; block elements end lines."""

    _HIDDEN = frozenset({"script", "style", "template", "noscript"})
    _BLOCKS = frozenset(
        [
            "address",
            "article",
            "aside",
            "blockquote",
            "br",
            "dd",
            "div",
            "dl",
            "dt",
            "fieldset",
            "figure",
            "footer",
            "form",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "header",
            "hr",
            "li",
            "main",
            "nav",
            "ol",
            "p",
            "pre",
            "section",
            "table",
            "td",
            "th",
            "tr",
            "ul",
        ]
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.title: list[str] = []
        self._hidden = 0
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in self._HIDDEN
        self._in_title |= tag == "title"
        if tag in self._BLOCKS:
            self.pieces.append("\n\n" if tag in ("p", "div", "section", "article", "h1", "h2", "h3") else "\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in self._HIDDEN))
        self._in_title &= tag != "title"
        if tag in self._BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            (self.title if self._in_title else self.pieces).append(data)


def html_text(source: str) -> tuple[str, str]:
    """Return the title and the visible text of an HTML page."""
    parser = _HTMLText()
    parser.feed(source)
    parser.close()
    text = re.sub(r"[^\S\n]+", " ", "".join(parser.pieces))
    return " ".join("".join(parser.title).split()), re.sub(
        r" ?\n ?(?:\n\s*)?", lambda m: "\n" * min(m[0].count("\n"), 2), text
    ).strip()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a file, each limited to `MAX_BYTES`."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_BYTES + 1):
                number += 1
                if len(line) > MAX_BYTES:
                    raise IntaglioError(f"line {number} of {path} is longer than {MAX_BYTES >> 20} MiB: split it")
                text = _decode(line, f"line {number} of {path}")
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except OSError as error:
        raise IntaglioError(f"{path} cannot be read: {error.strerror}") from error


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        if line.strip():
            where = f"line {number} of {path}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise IntaglioError(f"{where} is not JSON: {error}") from None


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(MAX_BYTES)
    lines = (line for _, line in _lines(path))
    reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise IntaglioError(f"line {reader.reader.line_num} of {path} is not CSV: {error}") from None
        if row is None:
            return
        where = f"line {reader.line_num} of {path}"
        if None in row or None in row.values():
            raise IntaglioError(f"{where} does not have the {len(reader.fieldnames or ())} columns of its header")
        yield where, row


def chunk_spans(
    text: str, size: int, too_long: Callable[[list[str]], list[bool]] | None = None
) -> list[tuple[int, int]]:
    """Return the (start, stop) of a text's chunks; together they cover all but white space.

    A chunk is cut at the last blank line within `size` characters, else at the last line, sentence, word, or anywhere.

    Args:
        text: the document.
        size: most characters; 0: no limit.
        too_long: whether each piece exceeds the encoder's context; such a piece is halved.
    """
    spans = list(_cut(text, 0, len(text), size or len(text) or 1))
    if too_long is None:
        return spans
    pending, result = spans, []
    while pending:
        verdicts = too_long([text[start:stop] for start, stop in pending])
        result += [span for span, long in zip(pending, verdicts, strict=True) if not long or span[1] - span[0] < 2]
        halves = [span for span, long in zip(pending, verdicts, strict=True) if long and span[1] - span[0] >= 2]
        pending = [piece for a, b in halves for piece in _cut(text, a, b, (b - a + 1) // 2 + (b - a) // 8)]
    return sorted(result)


def _cut(text: str, start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    while start < stop:
        while start < stop and text[start].isspace():
            start += 1
        end, following = stop, stop
        if stop - start > size:
            end = following = start + size
            for pattern in _BREAKS:
                # Cuts before the first quarter would leave slivers.
                if ends := list(pattern.finditer(text, start + size // 4, min(start + size + 1, stop))):
                    end, following = ends[-1].start(), ends[-1].end()
                    break
        while end > start and text[end - 1].isspace():
            end -= 1
        if end > start:
            yield start, end
        start = max(following, start + 1)
