"""Retrieval metrics of indexes on judged queries: nDCG, MRR and recall by ir-measures, latency, and bytes."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from intaglio.errors import IntaglioError
from intaglio.report import svg
from intaglio.report.html import evaluation_page
from intaglio.search.index import Index, open_index
from intaglio.search.judgements import Judged
from intaglio.search.milvus import MilvusIndex

METRICS = ("nDCG@10", "RR@10", "R@10", "R@100")
"""Names of ir-measures; RR is the reciprocal rank, whose mean is the MRR."""
_SHOWN = ("nDCG@10", "MRR@10", "R@10", "R@100")


def evaluate(
    index: str | os.PathLike[str] | Index | MilvusIndex,
    judged: Judged,
    k: int = 100,
    *,
    device: str | None = None,
    approximate: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure an index on judged queries, each searched alone.

    A judged document that is not in the index counts as not retrieved.

    Args:
        index: a directory, a `milvus://` address, or an open index.
        judged: queries and relevant documents.
        k: results for each query. Default 100.
        device: of the encoder. Default: the CPU.
        approximate: search approximately, and measure the recall of exact search. Default False.
        progress: called with (done, total, what).

    Returns:
        {"index", "kind", "encoder", "documents", "queries", "missing", metrics by name, "milliseconds" (median),
        "milliseconds_95" (95th percentile), "bytes", "bytes_text", "approximate": {"recall" (of exact search's k
        results), "milliseconds_exact"} or None}; latency includes encoding the query.

    Raises:
        IntaglioError: ir-measures is not installed, or the index cannot be searched.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise IntaglioError(
            "evaluation needs the package ir-measures; run `pip install 'intaglio[search]'` first"
        ) from error
    if isinstance(index, (str, os.PathLike)):
        with open_index(index, device=device) as opened:
            return evaluate(opened, judged, k, approximate=approximate, progress=progress)
    name = Path(index.path).name
    # Load the encoder and compile the kernels.
    index.search(next(iter(judged.queries.values())), k, approximate=approximate)
    retrieved: dict[str, dict[str, float]] = {}
    seconds: list[float] = []
    exact: list[float] = []
    recalls: list[float] = []
    for done, (id, query) in enumerate(judged.queries.items(), start=1):
        start = time.perf_counter()
        hits = index.search(query, k, approximate=approximate)
        seconds.append(time.perf_counter() - start)
        if approximate:
            start = time.perf_counter()
            best = {hit.id for hit in index.search(query, k)}
            exact.append(time.perf_counter() - start)
            recalls.append(len(best & {hit.id for hit in hits}) / max(len(best), 1))
        # Ranks, because metrics sort by score and would break ties by id.
        retrieved[id] = {hit.id: float(-hit.rank) for hit in hits}
        if progress is not None:
            progress(done, len(judged.queries), f"evaluate: {name}")
    measures = [ir_measures.parse_measure(metric) for metric in METRICS]
    # A query without a hit has no line in the run, and counts as 0.
    sums = dict.fromkeys(METRICS, 0.0)
    for value in ir_measures.iter_calc(measures, judged.relevant, retrieved):
        sums[str(value.measure)] += value.value
    info = index.info()
    ids = {id for grades in judged.relevant.values() for id, grade in grades.items() if grade > 0}
    return {
        "index": name,
        "kind": info["kind"],
        "encoder": info["encoder"] and info["encoder"]["name"],
        "documents": info["documents"],
        "queries": len(judged.queries),
        "missing": sum(id not in index for id in ids),
        **{metric: sums[metric] / len(judged.queries) for metric in METRICS},
        "milliseconds": 1000 * statistics.median(seconds),
        "milliseconds_95": 1000 * sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1],
        "bytes": info["bytes"]["total"],
        "bytes_text": info["bytes"]["text"],
        "approximate": {"recall": statistics.fmean(recalls), "milliseconds_exact": 1000 * statistics.median(exact)}
        if approximate
        else None,
    }


def cells(result: Mapping[str, Any]) -> list[str]:
    """Return a result as formatted cells; see `HEADINGS`."""
    return [
        result["index"],
        result["kind"] + (f", {result['encoder']}" if result["encoder"] else ""),
        *(f"{result[metric]:.3f}" for metric in METRICS),
        f"{result['milliseconds']:.1f}",
        f"{result['milliseconds_95']:.1f}",
        *(
            (f"{result['bytes'] / 1e6:,.1f}", f"{result['bytes'] / max(1, result['bytes_text']):.2f}")
            if result["bytes"] is not None  # unknown of a server
            else ("-", "-")
        ),
    ]


HEADINGS = ("index", "kind", *_SHOWN, "ms", "95 %", "MB", "of text")


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return results as a table for the terminal."""
    made = Table("index", box=SIMPLE_HEAD, title=_title(results), caption=_caption(results))
    for heading in HEADINGS[2:]:
        made.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        name, _, *numbers = cells(result)
        made.add_row(Text(name), *numbers)
    return made


def _title(results: Sequence[Mapping[str, Any]]) -> str:
    return f"{results[0]['queries']:,} queries, {max(result['documents'] for result in results):,} documents"


def _caption(results: Sequence[Mapping[str, Any]]) -> str:
    missing = max(result["missing"] for result in results)
    words = (
        "R: recall; ms: median time of a query with its encoding, and 95th percentile; of text: size over the text's"
    )
    sentences = [words]
    if missing:
        sentences.append(f"{missing:,} relevant documents are not in an index")
    for result in results:
        if measured := result.get("approximate"):
            sentences.append(
                f"{result['index']}: approximate search returns {measured['recall']:.3f} of exact search's results,"
                f" which takes {measured['milliseconds_exact']:.1f} ms"
            )
    return ". ".join(sentences) + ("." if len(sentences) > 1 else "")


def plots(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return SVG scatter plots of nDCG@10 against milliseconds and against bytes."""
    axes = (
        ("milliseconds", "Quality against time", "milliseconds a query, log scale", 1.0),
        ("bytes", "Quality against size", "megabytes of the index, log scale", 1e6),
    )
    pictures = []
    for key, title, axis, unit in axes:
        known = [result for result in results if result[key] is not None]
        if not known:
            continue
        points = [svg.Point(result["index"], result[key] / unit, result["nDCG@10"]) for result in known]
        words = "; ".join(f"{p.label}: nDCG@10 {p.y:.3f} at {p.x:,.3g}" for p in points) + "."
        pictures.append(svg.scatter(title, words, points, x_axis=axis, y_axis="nDCG@10"))
    return pictures


def report_page(
    results: Sequence[Mapping[str, Any]], examples: Sequence[tuple[str, Mapping[str, Sequence[str]]]] = ()
) -> str:
    """Return results as a self-contained HTML page with the table, the plots and example queries."""
    rows = [cells(result) for result in results]
    title = "Retrieval quality and cost"
    return evaluation_page(title, _title(results), HEADINGS, rows, plots(results), _caption(results), examples)
