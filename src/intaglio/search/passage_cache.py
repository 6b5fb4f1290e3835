"""Tensors kept beside an index's passages, such as their compressed form for one decoder.

They are rows of a table in the index's database, so that a commit has all of them or none. A passage that is updated
gets another number; rows of numbers that are gone are dropped by the first write of each cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.errors import IntaglioError
from intaglio.search.results import Hit
from intaglio.search.storage import Store, sentences

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TABLE = "passage_tensors"


class PassageCache:
    """Named arrays of passages, by passage.

    Args:
        store: the index's directory.
        space: what the arrays depend on beside the text, such as a model's fingerprint; other spaces are invisible.
    """

    def __init__(self, store: Store, space: str) -> None:
        self._store, self._space = store, space
        self._pruned = False

    @property
    def path(self) -> Path:
        """The index's directory."""
        return self._store.path

    def _chunk(self, hit: Hit) -> int:
        row = self._store.db.execute(
            "SELECT chunk FROM chunks JOIN documents ON document = number WHERE id = ? AND start = ?",
            (hit.id, hit.start),
        ).fetchone()
        if row is None:
            raise IntaglioError(f"the document {hit.id!r} of {self._store.path} has changed; search again")
        return int(row[0])

    def read(self, hit: Hit) -> dict[str, NDArray[Any]] | None:
        """Return the arrays of a hit's passage, or None."""
        from safetensors.numpy import load

        with sentences(self._store.path):
            db = self._store.db
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (_TABLE,)).fetchone():
                return None
            sql = f"SELECT tensors FROM {_TABLE} WHERE space = ? AND chunk = ?"
            row = db.execute(sql, (self._space, self._chunk(hit))).fetchone()
        return None if row is None else load(row[0])

    def write(self, rows: Sequence[tuple[Hit, Mapping[str, NDArray[Any]]]]) -> None:
        """Keep the arrays of passages, replacing earlier ones, in one commit.

        Raises:
            IntaglioError: another process writes the index, or a document has changed.
        """
        from safetensors.numpy import save

        if not rows:
            return
        with self._store.writing(), self._store.transaction() as db:
            db.execute(
                f"CREATE TABLE IF NOT EXISTS {_TABLE} (space TEXT NOT NULL, chunk INTEGER NOT NULL,"
                " tensors BLOB NOT NULL, PRIMARY KEY (space, chunk)) WITHOUT ROWID"
            )
            if not self._pruned:
                db.execute(f"DELETE FROM {_TABLE} WHERE chunk NOT IN (SELECT chunk FROM chunks)")
            values = [(self._space, self._chunk(hit), save(dict(arrays))) for hit, arrays in rows]
            db.executemany(f"INSERT OR REPLACE INTO {_TABLE} VALUES (?, ?, ?)", values)
        self._pruned = True


__all__ = ["PassageCache"]
