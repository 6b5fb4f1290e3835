"""The search demo: Python's own documentation strings with BM25, a dense and a learned-sparse encoder."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from intaglio import atomic_io
from intaglio.cli.demo_output import demo_directory
from intaglio.data.docstrings import Pair, pairs, words
from intaglio.data.python_source import source_files
from intaglio.methods.base import Progress, no_progress
from intaglio.search import Document, Index
from intaglio.search import evaluate as evaluation
from intaglio.search.judgements import Judged

INDEXES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bm25", {"kind": "bm25"}),
    ("minilm", {"kind": "dense", "encoder": "minilm"}),
    ("splade-tiny", {"kind": "sparse", "encoder": "splade-tiny"}),
)
"""Name and settings of each index."""
QUERIES = (
    "delete a folder and everything in it",
    "run a function later in another thread",
    "compare two texts line by line",
    "split a command line into words like a shell",
    "most common elements and their counts",
)
"""Example queries, in words that the documentation does not always use."""
MAX_DOCUMENTS = 1500
"""Most bodies of docstrings that are indexed: about a minute of encoding on each of two cores."""
MAX_QUERIES = 300
"""Most summaries that the indexes are measured on."""
SHOWN = 3
"""Results of each example query."""


def distinct_pairs() -> list[Pair]:
    """Return the standard library's docstrings as summary and body, without repeated summaries or bodies."""
    queries: set[str] = set()
    documents: set[str] = set()
    kept = []
    for pair in pairs(source_files(), "text"):
        query, document = words(pair.query), words(pair.document)
        if query not in queries and document not in documents:
            kept.append(pair)
        queries.add(query)
        documents.add(document)
    return kept


def documents_of(kept: Sequence[Pair]) -> list[tuple[str, Document]]:
    """Return each summary with the document that holds its body; ids are unique dotted names."""
    result: dict[str, tuple[str, Document]] = {}
    for pair in kept:
        name = f"{pair.module}.{pair.name}"
        id = name if name not in result else f"{name}-{pair.id}"
        result[id] = (pair.query, Document(id, pair.document, name, {"module": pair.module}))
    return list(result.values())


def demo(
    output: str | os.PathLike[str],
    *,
    device: str | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Index the bodies of docstrings three ways, search them for their summaries, and show five queries side by side.

    Returns:
        The content of `report.json`: {"results", "seconds_to_index", "examples", "seconds"}; `results` are those of
        `evaluate`, `examples` the first results of each query by index.
    """
    started = time.time()
    with demo_directory(output, *(name for name, _ in INDEXES)) as temporary:
        found = documents_of(distinct_pairs())
        found = random.Random(seed).sample(found, min(MAX_DOCUMENTS, len(found)))
        asked = found[:MAX_QUERIES]
        judged = Judged(
            {document.id: query for query, document in asked}, {document.id: {document.id: 1} for _, document in asked}
        )
        results, seconds_to_index = [], {}
        examples: dict[str, dict[str, list[str]]] = {query: {} for query in QUERIES}
        for name, settings in INDEXES:
            options: dict[str, Any] = {"device": device} if device and "encoder" in settings else {}
            with Index.create(temporary / name, **settings, **options) as index:
                report = index.add((document for _, document in found), progress=progress)
                seconds_to_index[name] = report.seconds
                results.append(evaluation.evaluate(index, judged, progress=progress))
                for query in QUERIES:
                    examples[query][name] = [hit.id for hit in index.search(query, SHOWN)]
        document = {
            "results": results,
            "seconds_to_index": seconds_to_index,
            "examples": examples,
            "seconds": time.time() - started,
        }
        (temporary / "report.json").write_text(atomic_io.to_json(document), encoding="utf-8")
        page = evaluation.report_page(results, list(examples.items()))
        (temporary / "report.html").write_text(page, encoding="utf-8")
    return document


def tables(document: dict[str, Any]) -> list[Table]:
    """Return the measurements and the example queries as tables for the terminal."""
    names = [result["index"] for result in document["results"]]
    shown = Table("query", *names, box=SIMPLE_HEAD, title=f"The first {SHOWN} results of five queries")
    for query, columns in document["examples"].items():
        shown.add_row(query, *(Text("\n".join(columns[name]), overflow="fold") for name in names), end_section=True)
    return [evaluation.table(document["results"]), shown]
