"""The directory of an index: a SQLite database (WAL) and immutable segments in safetensors files.

    index.db              settings, documents, chunks, deleted chunks, the list of segments
    segments/N.safetensors  vectors and posting lists of a run of chunks
    segments/N.ann        approximate index of these vectors, optional
    encoders/N.safetensors  head of a compatible encoder that `index upgrade` trained
    lock                  held by the writer

The commit point is a SQLite transaction: a segment is written and flushed first, then registered together with its
documents. A file that is not registered is left over from a killed writer, and removed by the next. Compaction unlinks
the merged files after its commit; readers hold them open.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import mmap
import os
import sqlite3
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio import atomic_io
from intaglio.errors import IntaglioError, first_line, shorten

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION, UPGRADED = 1, 2
"""Format of the directory, and that of an index whose segments may be of several encoders."""
DATABASE, SEGMENTS, ENCODERS, LOCK = "index.db", "segments", "encoders", "lock"
UPGRADE_SECONDS = 30.0
"""Longest time that a writer waits while an index is being upgraded."""
_SCHEMA = """
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, title TEXT NOT NULL, metadata TEXT NOT NULL,
    digest BLOB NOT NULL, bytes INTEGER NOT NULL, text BLOB NOT NULL
);
CREATE TABLE chunks (
    chunk INTEGER PRIMARY KEY, document INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL
);
CREATE INDEX chunks_of_document ON chunks (document);
CREATE TABLE dead (chunk INTEGER PRIMARY KEY);
CREATE TABLE segments (
    number INTEGER PRIMARY KEY, first INTEGER NOT NULL, last INTEGER NOT NULL, rows INTEGER NOT NULL,
    bytes INTEGER NOT NULL, checksum INTEGER NOT NULL, mtime INTEGER NOT NULL
);
"""
_DTYPES = {"F32": np.float32, "I32": np.int32, "I64": np.int64, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64}


@dataclasses.dataclass(frozen=True)
class SegmentRow:
    """A registered segment: number, first and last chunk, rows, and the file's size, CRC-32 and modification time."""

    number: int
    first: int
    last: int
    rows: int
    bytes: int
    checksum: int
    mtime: int


class CorruptSegmentError(Exception):
    """A segment file that is missing, truncated or changed."""


@contextlib.contextmanager
def sentences(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the disk into one sentence."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if "full" in str(error):
            raise IntaglioError(f"the disk of {path} is full; what was committed before is kept") from error
        if "locked" in str(error):
            raise IntaglioError(f"the index {path} is being written by another process; try again later") from error
        raise IntaglioError(f"the database of the index {path} cannot be used: {first_line(error)}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise IntaglioError(f"the disk of {path} is full; what was committed before is kept") from error
        raise IntaglioError(
            f"cannot write {path}: {error.strerror or error}; what was committed before is kept"
        ) from error


class Store:
    """Database and segment files of an index.

    Args:
        path: the directory of an existing index.

    Raises:
        IntaglioError: there is no index, or it is of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / DATABASE).is_file():
            what = "is no index" if path.exists() else "does not exist"
            raise IntaglioError(f"{path} {what}: `intaglio index DOCS -o {path}` creates one")
        with sentences(path):
            # The server searches from several threads, one at a time.
            self.db = sqlite3.connect(path / DATABASE, isolation_level=None, check_same_thread=False, timeout=30)
            try:
                self.db.execute("PRAGMA synchronous = FULL")
                self.settings: dict[str, Any] = {}
                self.read_settings()
            except sqlite3.DatabaseError:
                self.db.close()
                raise
        if (version := self.settings.get("version")) not in (VERSION, UPGRADED):
            self.db.close()
            raise IntaglioError(
                f"the index {path} has format {version}, this version of intaglio reads {VERSION} and {UPGRADED}; build"
                " it again"
            )

    @staticmethod
    def create(path: Path, settings: dict[str, Any]) -> None:
        """Write an empty index atomically."""
        with atomic_io.directory(path) as temporary:
            (temporary / SEGMENTS).mkdir()
            (temporary / LOCK).touch()
            with sentences(path), contextlib.closing(sqlite3.connect(temporary / DATABASE)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.executescript(_SCHEMA)
                values = {"version": VERSION, "generation": 0, **settings}
                db.executemany(
                    "INSERT INTO settings VALUES (?, ?)", [(key, json.dumps(value)) for key, value in values.items()]
                )
                db.commit()

    def read_settings(self) -> None:
        """Read the settings, which another process may have changed."""
        rows = self.db.execute("SELECT key, value FROM settings")
        self.settings = {key: json.loads(value) for key, value in rows}

    def write_settings(self, values: Mapping[str, Any]) -> None:
        """Change settings, inside a transaction."""
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        self.db.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", rows)

    def close(self) -> None:
        """Close the database."""
        self.db.close()

    @contextlib.contextmanager
    def writing(self, waits: bool = False) -> Iterator[None]:
        """Hold the writer's lock; files that a killed writer left are removed first.

        Writers give way to the short commits of an upgrade; with `waits`, any other writer is awaited.

        Raises:
            IntaglioError: another process holds it.
        """
        busy = f"the index {self.path} is being written by another process; try again when it is done"
        upgrading = self.settings.get("upgrade", {}).get("state") == "encoding"
        timeout = UPGRADE_SECONDS if upgrading else 0.0
        with atomic_io.locked(self.path / LOCK, None if waits else busy, timeout), sentences(self.path):
            rows = self.segments()
            known = {file(row.number) for row in rows for file in (self.file, self.ann_file)}
            for file in (self.path / SEGMENTS).iterdir():
                if file not in known:
                    file.unlink()
            yield
            # Moves the log into the database; a reader in the way is not waited for.
            self.db.execute("PRAGMA busy_timeout = 0")
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self.db.execute("PRAGMA busy_timeout = 30000")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit what the block changes, with the next generation, or nothing."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield self.db
            self.db.execute("UPDATE settings SET value = value + 1 WHERE key = 'generation'")
            self.db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give the block one consistent view of the database."""
        if self.db.in_transaction:
            yield self.db
            return
        self.db.execute("BEGIN")
        try:
            yield self.db
        finally:
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("COMMIT")

    def generation(self) -> int:
        """Return the number of commits."""
        return int(self.db.execute("SELECT value FROM settings WHERE key = 'generation'").fetchone()[0])

    def segments(self) -> list[SegmentRow]:
        """Return the registered segments in the order of their chunks."""
        rows = self.db.execute("SELECT number, first, last, rows, bytes, checksum, mtime FROM segments ORDER BY first")
        return [SegmentRow(*row) for row in rows]

    def dead(self) -> NDArray[np.int64]:
        """Return the deleted chunks that segments still hold, ascending."""
        return np.fromiter((row[0] for row in self.db.execute("SELECT chunk FROM dead ORDER BY chunk")), np.int64)

    def file(self, number: int) -> Path:
        """Return the file of a segment."""
        return self.path / SEGMENTS / f"{number}.safetensors"

    def ann_file(self, number: int) -> Path:
        """Return the file of a segment's approximate index, which `index compact --ann` writes."""
        return self.file(number).with_suffix(".ann")

    def write_segment(self, arrays: dict[str, NDArray[Any]]) -> SegmentRow:
        """Write and flush a segment; it is registered by `register`."""
        from safetensors.numpy import save_file

        last = self.db.execute("SELECT coalesce(max(number), 0) FROM segments").fetchone()[0]
        number = int(max([last, *(int(file.stem) for file in (self.path / SEGMENTS).iterdir())])) + 1
        file = self.file(number)
        try:
            try:
                save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file)
            except Exception as error:  # safetensors hides the errno in its own exception
                full = "No space" in str(error) or "os error 28" in str(error)
                raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
            os.chmod(file, (self.path / DATABASE).stat().st_mode & 0o666)
            atomic_io.fsync_path(file)
            atomic_io.fsync_path(file.parent)
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        stat, chunks = file.stat(), arrays["chunks"]
        return SegmentRow(
            number, int(chunks[0]), int(chunks[-1]), len(chunks), stat.st_size, checksum(file), stat.st_mtime_ns
        )

    def register(self, row: SegmentRow) -> None:
        """Register a segment, inside a transaction."""
        values = dataclasses.astuple(row)
        self.db.execute("INSERT INTO segments VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def numbers(self, ids: Iterable[str]) -> list[int]:
        """Return the numbers of documents by id.

        Raises:
            IntaglioError: an id is unknown.
        """
        numbers = []
        for identity in dict.fromkeys(ids):
            row = self.db.execute("SELECT number FROM documents WHERE id = ?", (identity,)).fetchone()
            if row is None:
                name = shorten(str(identity))
                raise IntaglioError(f"no document of {self.path} has the id {name!r}; nothing was deleted")
            numbers.append(int(row[0]))
        return numbers

    def remove(self, document: int) -> None:
        """Delete a document, inside a transaction."""
        db = self.db
        db.execute("INSERT INTO dead SELECT chunk FROM chunks WHERE document = ?", (document,))
        db.execute("DELETE FROM chunks WHERE document = ?", (document,))
        db.execute("DELETE FROM documents WHERE number = ?", (document,))

    def read_segment(self, row: SegmentRow, verify: bool = False) -> dict[str, NDArray[Any]]:
        """Map a segment's arrays; its checksum is compared if the file's time is not the recorded one.

        Raises:
            CorruptSegmentError: it is missing, truncated or changed.
            FileNotFoundError: it is missing.
        """
        file = self.file(row.number)
        with file.open("rb") as stream:
            stat = os.fstat(stream.fileno())
            if stat.st_size != row.bytes:
                raise CorruptSegmentError(f"it has {stat.st_size} bytes instead of {row.bytes}")
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if (verify or stat.st_mtime_ns != row.mtime) and checksum(file) != row.checksum:
            raise CorruptSegmentError("its checksum differs")
        (length,) = struct.unpack_from("<Q", mapped)
        header, base = json.loads(mapped[8 : 8 + length]), 8 + length
        return {
            name: np.frombuffer(
                mapped,
                _DTYPES[about["dtype"]],
                int(np.prod(about["shape"], dtype=np.int64)),
                base + about["data_offsets"][0],
            ).reshape(about["shape"])
            for name, about in header.items()
            if name != "__metadata__"
        }

    def shrink(self) -> None:
        """Give free pages of the database back to the disk."""
        if self.db.execute("PRAGMA freelist_count").fetchone()[0]:
            with contextlib.suppress(sqlite3.OperationalError):  # a reader is in the way
                self.db.execute("VACUUM")


def checksum(file: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


__all__ = ["CorruptSegmentError", "SegmentRow", "Store", "sentences"]
