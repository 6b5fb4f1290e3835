"""Upgrade of an index to another encoder: a head trained on cached vectors, a report, and new vectors piece by piece.

An upgrade begins with one commit, which makes the new encoder the index's own; segments keep the vectors that they
have, and name their encoder. Each piece of documents that is encoded again replaces its segment in a commit of its own,
so a stopped upgrade resumes at the first segment with older vectors.

Dimension letters: Q queries, N sampled chunks, D dimensions of a vector.
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from intaglio import atomic_io
from intaglio.errors import IntaglioError
from intaglio.search.compaction import Compaction
from intaglio.search.encoders import CompatibleEncoder, TextEncoder, describe_encoder
from intaglio.search.results import Progress
from intaglio.search.segment_writer import ENCODE_CHUNKS, encode_chunks, space_arrays
from intaglio.search.snapshot import Segment, Snapshot
from intaglio.search.storage import ENCODERS, UPGRADED, Store, sentences

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from intaglio.search.judgements import Judged

REEMBED = "reembed"
METHODS = ("bt2", "bct", "bct_distill", "naive", "procrustes", REEMBED)
PIECE = 1024
"""Most chunks of a commit."""
MAX_QUERIES = 2000
DEPTH = 10


@dataclass(frozen=True)
class Plan:
    """How an upgrade begins; see `Index.upgrade`."""

    method: str
    judged: Judged | None
    queries: tuple[str, ...]
    sample: int
    steps: int
    fields: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Sample:
    """Chunks of the index with their documents' numbers and old vectors [N, D], and how queries are judged.

    Args:
        texts: of the chunks.
        document_N: place of each chunk's document.
        old_ND: vectors of the old encoder.
        queries: their texts.
        relevant: places of each query's documents; empty without judgements.
    """

    texts: list[str]
    document_N: NDArray[np.int64]
    old_ND: NDArray[np.float32]
    queries: list[str]
    relevant: list[list[int]]


@dataclass(frozen=True)
class Upgrade:
    """The upgrade of an index.

    Args:
        store: the index's directory.
        view: gives one consistent view of database and segments.
        compaction: replaces segments.
        lock: held while the database is used, and not while texts are encoded.
    """

    store: Store
    view: Callable[[], AbstractContextManager[Snapshot]]
    compaction: Compaction
    lock: threading.RLock

    def begins(self, new: TextEncoder | None, method: str | None) -> bool:
        """Return whether an upgrade begins; otherwise the one under way resumes."""
        known = self.store.settings.get("upgrade")
        if new is None or known is None:
            return new is not None
        return (new.fingerprint, method or known["method"]) != (known["base"], known["method"])

    def begin(self, old: TextEncoder, new: TextEncoder, plan: Plan, progress: Progress | None) -> TextEncoder:
        """Train the head, measure it, and make the new encoder the index's own; return it."""
        self._check(old, new, plan)
        with self.lock, sentences(self.store.path), self.view() as snapshot:
            sample = self._sample(snapshot, old, plan)
            space, recorded = snapshot.space + 1, self.store.settings["encoder"]
        vectors = _Vectors(sample, old, new, progress)
        target: TextEncoder = new
        fields: dict[str, Any] = {}
        if plan.method != REEMBED and not (plan.method == "bt2" and _extends(new, old)):
            target, fields = self._trained(new, plan, vectors, progress)
        report = vectors.report(target if plan.method != REEMBED else None)
        begun = {"method": plan.method, "fields": fields, "state": "encoding", "base": new.fingerprint}
        with self.lock, self.store.writing(waits=True):
            with self.view():
                settings = self.store.settings
            if settings["encoder"]["fingerprint"] != recorded["fingerprint"]:
                raise IntaglioError(f"another upgrade of {self.store.path} has begun meanwhile; nothing was changed")
            with self.store.transaction():
                self.store.write_settings(
                    {
                        "version": UPGRADED,
                        "space": space,
                        "spaces": {**settings.get("spaces", {}), str(space - 1): recorded},
                        "encoder": describe_encoder(target),
                        "mixable": plan.method != REEMBED,
                        "upgrade": {**begun, "from": recorded, "to": describe_encoder(target), "report": report},
                    }
                )
            self.store.read_settings()
        return target

    def _check(self, old: TextEncoder, new: TextEncoder, plan: Plan) -> None:
        path = self.store.path
        if plan.method not in METHODS:
            raise IntaglioError(f"method is {plan.method!r}; accepted: {', '.join(METHODS)}")
        if old.kind != "dense":
            raise IntaglioError(f"the index {path} holds {old.kind} vectors; only dense vectors are upgraded")
        if new.kind != "dense":
            raise IntaglioError(f"the new encoder {new.name} is {new.kind}; {path} holds dense vectors, so a dense one"
                                " is accepted")  # fmt: skip
        if new.fingerprint == old.fingerprint:
            raise IntaglioError(f"the index {path} holds vectors of {new.name} already; name another encoder")
        known = self.store.settings.get("upgrade", {})
        if known.get("state") == "encoding" and REEMBED in (plan.method, known["method"]):
            raise IntaglioError(
                f"the upgrade of {path} by {known['method']} is not finished; run `intaglio index upgrade {path}` first"
            )
        if plan.method == "bt2" and getattr(new, "extends", None) and not _extends(new, old):
            raise IntaglioError(
                f"the encoder {new.name} was trained to be searched among vectors of another encoder than that of"
                f" {path}; vectors of a third space cannot be compared: train it with the index's encoder as old, or"
                " use --method reembed"
            )
        if plan.sample < 2 or plan.steps < 1:
            raise IntaglioError(f"sample is {plan.sample} and steps is {plan.steps}; at least 2 and 1 are accepted")

    def _sample(self, snapshot: Snapshot, old: TextEncoder, plan: Plan) -> Sample:
        """Return random chunks, those of judged documents among them, with the vectors that the index holds."""
        db = self.store.db
        queries = plan.queries if plan.judged is None else tuple(plan.judged.queries.values())
        grades: list[Mapping[str, int]] = [{}] * len(queries)
        if plan.judged is not None:
            grades = [plan.judged.relevant[id] for id in plan.judged.queries]
        live = np.concatenate([np.empty(0, np.int64), *(s.arrays["chunks"][s.live] for s in snapshot.segments)])
        if not len(live):
            raise IntaglioError(f"the index {self.store.path} has no documents, so nothing can be upgraded")
        order = np.random.default_rng(plan.seed).permutation(len(live))
        held = set(live.tolist())
        sql = "SELECT chunk FROM chunks JOIN documents ON document = number WHERE id = ?"
        wanted: dict[int, list[int]] = {}
        for i in sorted(range(len(queries)), key=lambda i: _digest(queries[i])):
            own = [chunk for id, grade in grades[i].items() if grade > 0 for (chunk,) in db.execute(sql, (id,))]
            own = [chunk for chunk in own if chunk in held]
            if len(wanted) < MAX_QUERIES and (own or plan.judged is None):
                wanted[i] = own
        if plan.judged is not None and not wanted:
            raise IntaglioError(f"no document that the pairs name is in {self.store.path}")
        chunks = dict.fromkeys(chunk for own in wanted.values() for chunk in own)
        for chunk in live[order].tolist():
            if len(chunks) >= plan.sample:
                break
            chunks.setdefault(chunk)
        texts, documents = zip(*(_text(db, chunk) for chunk in chunks), strict=True)
        places = {number: place for place, number in enumerate(dict.fromkeys(documents))}
        document_of = {chunk: places[number] for chunk, number in zip(chunks, documents, strict=True)}
        relevant = [list(dict.fromkeys(document_of[chunk] for chunk in own)) for own in wanted.values()]
        return Sample(
            list(texts),
            np.array([places[number] for number in documents]),
            self._stored(snapshot, old, list(chunks), texts),
            [queries[i] for i in wanted],
            relevant if plan.judged is not None else [],
        )

    def _stored(
        self, snapshot: Snapshot, old: TextEncoder, chunks: Sequence[int], texts: Sequence[str]
    ) -> NDArray[np.float32]:
        """Return the old encoder's vectors: as stored, or encoded where they are of a still older one."""
        known: dict[int, NDArray[np.float32]] = {}
        for segment in snapshot.segments:
            if segment.space == snapshot.space:
                numbers = segment.arrays["chunks"]
                rows = np.flatnonzero(np.isin(numbers, chunks))
                known |= zip(numbers[rows].tolist(), segment.arrays["dense.vectors"][rows], strict=True)
        missing = [i for i, chunk in enumerate(chunks) if chunk not in known]
        if missing:
            encoded = encode_chunks(old, [texts[i] for i in missing], None)["dense.vectors"]
            known |= zip((chunks[i] for i in missing), encoded, strict=True)
        return np.stack([known[chunk] for chunk in chunks])

    def _trained(
        self, new: TextEncoder, plan: Plan, vectors: _Vectors, progress: Progress | None
    ) -> tuple[TextEncoder, dict[str, Any]]:
        """Return the encoder with a head trained on the sample, which is written into the index."""
        from pydantic import ValidationError

        from intaglio.methods.base import no_progress, validation_sentence
        from intaglio.methods.registry import get_method

        cls: Any = get_method("bt2")
        given = {"arm": plan.method, **plan.fields}
        try:
            method = cls(**given)
        except ValidationError as error:
            raise IntaglioError(validation_sentence(error, cls, given)) from None
        head = method.fit_head(vectors.pairs(), steps=plan.steps, seed=plan.seed, progress=progress or no_progress)
        content: bytes = method.dump_head(head)
        digest = hashlib.sha256(content).hexdigest()
        file = f"{ENCODERS}/{digest[:16]}.safetensors"
        with sentences(self.store.path):
            (self.store.path / ENCODERS).mkdir(exist_ok=True)
        atomic_io.write_bytes(self.store.path / file, content)
        about = {"method": "bt2", "arm": plan.method, "file": file, "digest": digest}
        return CompatibleEncoder(new, head, about), method.model_dump(mode="json", exclude_defaults=True)

    def counts(self) -> dict[str, int]:
        """Return the number of chunks with older vectors as `left`, and none as `encoded`."""
        with self.lock, sentences(self.store.path), self.view() as snapshot:
            return {"encoded": 0, "left": sum(int(segment.live.sum()) for segment in snapshot.older)}

    def encode(
        self, encoder: Callable[[], TextEncoder | None], rate: float | None, progress: Progress | None
    ) -> dict[str, int]:
        """Encode all chunks with older vectors again, at most `rate` a second; return the counts."""
        done = 0
        while True:
            with self.lock, sentences(self.store.path), self.view() as snapshot:
                older = snapshot.older
                left = sum(int(segment.live.sum()) for segment in older)
                own, space = encoder(), snapshot.space
                chunks = older[0].arrays["chunks"][older[0].live].tolist() if older else []
                texts = [_text(self.store.db, chunk)[0] for chunk in chunks] if len(chunks) <= PIECE else []
            if progress:
                progress(done, done + left, "encoding")
            if not older:
                break
            if len(chunks) > PIECE:
                self._split(older[0])
                continue
            assert own is not None
            done += self._replace(older[0], chunks, self._encoded(own, texts, rate), space)
        self._finish()
        return {"encoded": done, "left": 0}

    def _split(self, segment: Segment) -> None:
        """Split a segment into pieces, unless another writer has replaced it."""
        with self.lock, self.store.writing(waits=True):
            with self.view() as snapshot:
                now = next((own for own in snapshot.older if own.row == segment.row), None)
            if now is not None:
                self.compaction.split(now, PIECE)

    def _encoded(self, encoder: TextEncoder, texts: list[str], rate: float | None) -> NDArray[np.float32]:
        """Return the vectors of chunks, at most `rate` of them a second."""
        parts = [np.empty((0, encoder.dimensions), np.float32)]
        size = ENCODE_CHUNKS if rate is None else max(1, min(ENCODE_CHUNKS, int(rate)))
        for low in range(0, len(texts), size):
            started = monotonic()
            part = texts[low : low + size]
            parts.append(encode_chunks(encoder, part, None)["dense.vectors"])
            if rate is not None:
                sleep(max(0.0, len(part) / rate - (monotonic() - started)))
        return np.concatenate(parts)

    def _replace(self, segment: Segment, chunks: Sequence[int], vectors_ND: NDArray[np.float32], space: int) -> int:
        """Replace a segment's vectors by those of an encoder; return the number of its chunks.

        Nothing is replaced, and 0 returned, if another writer has replaced it or another upgrade has begun meanwhile.
        """
        with self.lock, self.store.writing(waits=True):
            with self.view() as snapshot:
                now = next((own for own in snapshot.older if own.row == segment.row), None)
                begun = snapshot.space != space
            if now is None or begun:
                return 0
            kept = np.isin(chunks, now.arrays["chunks"][now.live])
            arrays = self.compaction.arrays([now], [now.live])
            arrays |= {"dense.vectors": vectors_ND[kept], **space_arrays(space)}
            new = [self.store.write_segment(arrays)] if kept.any() else []
            self.compaction.replace([now.row], new)
            return int(kept.sum())

    def _finish(self) -> None:
        """Record that all vectors are of the new encoder, and merge small segments."""
        with self.lock, self.store.writing(waits=True):
            with self.view() as snapshot:
                settings, older = self.store.settings, snapshot.older
            if older or settings["upgrade"]["state"] == "done":
                return
            with self.store.transaction():
                upgrade = {**settings["upgrade"], "state": "done"}
                self.store.write_settings({"upgrade": upgrade})
            self.compaction.merge_tiers()


class _Vectors:
    """Vectors of a sample by both encoders, half of whose queries are trained on."""

    def __init__(self, sample: Sample, old: TextEncoder, new: TextEncoder, progress: Progress | None) -> None:
        self.sample, self.old, self.new = sample, old, new
        self.chunks_old = sample.old_ND
        self.chunks_new = encode_chunks(new, sample.texts, progress)["dense.vectors"]
        self.queries_old, self.queries_new = (_queries(encoder, sample.queries) for encoder in (old, new))
        halves = np.array([_digest(query) % 2 == 0 for query in sample.queries], np.bool_)
        self.trained = halves if halves.any() and not halves.all() else np.zeros(len(halves), np.bool_)

    def _positives(self) -> NDArray[np.int64]:
        """Return a chunk of each query: of its documents, or of all, that which the old encoder ranks first."""
        scores_QN = self.queries_old @ self.chunks_old.T
        for scores_N, own in zip(scores_QN, self.sample.relevant, strict=False):
            scores_N[~np.isin(self.sample.document_N, own)] = -np.inf
        return scores_QN.argmax(1)

    def pairs(self) -> Any:
        """Return the pairs that a head is trained on: queries with a chunk, and each chunk with itself."""
        import torch

        from intaglio.methods.registry import get_method

        method: Any = get_method("bt2")
        chosen = np.flatnonzero(self.trained)
        own_P = np.arange(len(self.sample.texts))
        chunk_P = np.concatenate([self._positives()[chosen], own_P]) if len(chosen) else own_P
        sides = (
            np.concatenate([self.queries_new[chosen], self.chunks_new]),
            self.chunks_new[chunk_P],
            np.concatenate([self.queries_old[chosen], self.chunks_old]),
            self.chunks_old[chunk_P],
        )
        tensors = [torch.from_numpy(np.ascontiguousarray(side)) for side in sides]
        return method.cached_pairs(*tensors, torch.from_numpy(self.sample.document_N[chunk_P]))

    def report(self, target: TextEncoder | None) -> dict[str, Any] | None:
        """Return the quality of each direction on queries that were not trained on; None without queries.

        Judged queries are measured by nDCG@10 and MRR@10; those of a log by the share of the first ten documents that
        re-embedding everything would give as well.
        """
        chosen = np.flatnonzero(~self.trained)
        if not len(chosen):
            return None
        vectors: dict[str, tuple[Any, Any]] = {"old/old": (self.queries_old, self.chunks_old)}
        if target is not None:
            map = target.map if isinstance(target, CompatibleEncoder) else lambda vectors: vectors
            queries, chunks = map(self.queries_new), map(self.chunks_new)
            vectors["new/old"] = (queries[:, : self.chunks_old.shape[1]], self.chunks_old)
            vectors["new/new"] = (queries, chunks)
        vectors["re-embedded"] = (self.queries_new, self.chunks_new)
        scores = {name: self._of_documents(q[chosen] @ c.T) for name, (q, c) in vectors.items()}
        measured = {name: self._quality(own, scores["re-embedded"], chosen) for name, own in scores.items()}
        held_out = bool(self.trained.any())
        return {"queries": len(chosen), "documents": int(self.sample.document_N.max()) + 1, "held_out": held_out,
                "quality": measured}  # fmt: skip

    def _of_documents(self, scores_QN: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the score of each document, that of its best chunk."""
        document_N = self.sample.document_N
        order = np.argsort(document_N, kind="stable")
        starts = np.searchsorted(document_N[order], np.arange(document_N.max() + 1))
        result: NDArray[np.float32] = np.maximum.reduceat(scores_QN[:, order], starts, axis=1)
        return result

    def _quality(self, scores: Any, reference: Any, chosen: NDArray[np.int64]) -> dict[str, float]:
        import torch

        from intaglio.trainer.retrieval_evaluation import ranking_quality

        if self.sample.relevant:
            return ranking_quality(torch.from_numpy(scores), [self.sample.relevant[i] for i in chosen])
        best, wanted = (np.argsort(-own, axis=1, kind="stable")[:, :DEPTH] for own in (scores, reference))
        same = [len(set(a.tolist()) & set(b.tolist())) / len(a) for a, b in zip(best, wanted, strict=True)]
        return {f"overlap@{DEPTH}": sum(same) / len(same)}


def report_table(report: Mapping[str, Any]) -> Table:
    """Return the report of an upgrade as a table for the terminal."""
    held_out = "held-out queries" if report["held_out"] else "queries"
    table = Table(title=f"{report['queries']:,} {held_out}, {report['documents']:,} documents", box=SIMPLE_HEAD)
    table.add_column("query/document")
    metrics = list(report["quality"]["old/old"])
    for metric in metrics:
        table.add_column(metric, justify="right")
    for name, values in report["quality"].items():
        table.add_row(name, *(f"{values[metric]:.3f}" for metric in metrics))
    return table


def _queries(encoder: TextEncoder, texts: Sequence[str]) -> NDArray[np.float32]:
    if not texts:
        return np.empty((0, encoder.dimensions), np.float32)
    return np.asarray(encoder.encode_queries(list(texts)), np.float32)


def _extends(new: TextEncoder, old: TextEncoder) -> bool:
    """Return whether an encoder was trained to be searched among the vectors of another, as that reads texts now."""
    extends = getattr(new, "extends", None)
    return (
        extends is not None
        and getattr(old, "reads_as_recorded", True)
        and extends == (getattr(old, "weights", None), old.dimensions)
    )


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _text(db: Any, chunk: int) -> tuple[str, int]:
    """Return the text and the document of a chunk."""
    sql = "SELECT text, start, stop, number FROM chunks JOIN documents ON document = number WHERE chunk = ?"
    content, start, stop, number = db.execute(sql, (chunk,)).fetchone()
    return zlib.decompress(content).decode()[start:stop], int(number)


__all__ = ["METHODS", "PIECE", "Plan", "Upgrade", "report_table"]
