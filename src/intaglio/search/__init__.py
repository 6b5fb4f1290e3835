"""Search engine for your own documents: BM25, dense, learned-sparse and hybrid retrieval in one directory.

    from intaglio.search import Index, open_index

    with Index.create("index", kind="hybrid", encoder="minilm") as index:
        index.add("docs/")
        for hit in index.search("how are weights saved", k=5, filters=["type=md"]):
            print(hit.score, hit.id, hit.text)

- `index`: the `Index` class: create, open, add, delete, search, compact
- `results`: hits and reports; `retrieval`: ranking and fusion on a snapshot
- `segment_writer`: commits of documents; `compaction`: merging of segments
- `documents`: readers of folders, JSONL, CSV and data sets; chunks
- `storage`: the directory: SQLite, segments, commits, recovery
- `lexical`: BM25 and learned-sparse posting lists; `dense`: exact products
- `encoders`: text encoders and their fingerprints; `hard_negatives`: negatives for training them
- `milvus`: the same commands on a Milvus server
- `fusion`: reciprocal rank fusion; `filters`: metadata conditions
- `protocols`: first stage, reranker, aggregator and expander, the stages of a ranking
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from intaglio.search.documents import Document, read_documents
    from intaglio.search.encoders import TextEncoder, load_encoder
    from intaglio.search.hard_negatives import mine_hard_negatives
    from intaglio.search.index import Index, open_index
    from intaglio.search.results import AddReport, Hit

_MODULES = {
    "AddReport": "results",
    "Document": "documents",
    "Hit": "results",
    "Index": "index",
    "TextEncoder": "encoders",
    "load_encoder": "encoders",
    "mine_hard_negatives": "hard_negatives",
    "open_index": "index",
    "read_documents": "documents",
}

__all__ = [
    "AddReport",
    "Document",
    "Hit",
    "Index",
    "TextEncoder",
    "load_encoder",
    "mine_hard_negatives",
    "open_index",
    "read_documents",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
