"""The report of a recommender, as a section of a page, a page, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from intaglio.report.formatting import duration
from intaglio.report.html import trained_page
from intaglio.report.svg import clean_text

Document = Mapping[str, Any]
CANDIDATES = {"full": "all items", "popular": "100 popular unseen items", "uniform": "100 unseen items"}
"""Candidates of each protocol."""
MEASURES = ("HR@10", "NDCG@10", "MRR")


def recommender_summary(document: Document) -> str:
    """Return a recommender's report as one sentence."""
    rankings, data = document["rankings"], document["data"]
    model, popular = (
        next(row for row in rankings if row["protocol"] == "full" and (row["recommender"] == "popularity") == wanted)
        for wanted in (False, True)
    )
    return (
        f"{data['users']:,} users, {data['items']:,} items, {data['interactions']:,} interactions; NDCG@10 of each"
        f" user's last item among all unseen items: {model['NDCG@10']:.4f}, by popularity {popular['NDCG@10']:.4f}."
    )


def _rankings(document: Document) -> list[list[str]]:
    return [
        [row["recommender"], CANDIDATES[row["protocol"]], *(f"{row[name]:.4f}" for name in MEASURES)]
        for row in document["rankings"]
    ]


def recommender_section(document: Document, title: str = "Recommender") -> dict[str, Any]:
    """Return the section of a recommender for `trained_page`."""
    about = ("versions", "threads", "device", "dtype", "seconds")
    given = {name: value for name, value in document["parameters"].items() if value not in (None, [], False)}
    notes = {**given, **{name: document[name] for name in about if name in document}}
    if "seconds" in notes:
        notes["seconds"] = duration(notes["seconds"])
    tables = [
        {
            "title": "Each user's last item, ranked",
            "headings": ["Ranked by", "Among", *MEASURES],
            "rows": _rankings(document),
        }
    ]
    for sample in document["samples"]:
        columns = zip(sample["history"], sample["recommended"], strict=False)
        tables.append(
            {
                "title": f"User {clean_text(sample['user'])}, whose next item was {clean_text(sample['next'])}",
                "headings": ["Last items", "Recommended"],
                "rows": [[clean_text(cell) for cell in row] for row in columns],
            }
        )
    return {
        "title": title,
        "summary": recommender_summary(document),
        "curve": document["curve"],
        "tables": tables,
        "notes": notes,
    }


def recommender_page(document: Document) -> str:
    """Return the report of a recommender as a self-contained HTML page."""
    section = recommender_section(document, "Training and rankings")
    return trained_page(document["title"], section["summary"], [{**section, "summary": ""}])


def recommender_tables(document: Document) -> list[Table]:
    """Return rankings and the first sample as tables for the terminal."""
    rankings = Table("ranked by", "among", *MEASURES, box=SIMPLE_HEAD, title="Each user's last item, ranked")
    for row in _rankings(document):
        rankings.add_row(*row)
    tables = [rankings]
    for sample in document["samples"][:1]:
        title = f"User {sample['user']}, whose next item was {sample['next']}"
        shown = Table("last items", "recommended", box=SIMPLE_HEAD, title=Text(title))
        for pair in zip(sample["history"], sample["recommended"], strict=False):
            shown.add_row(*map(Text, pair))
        tables.append(shown)
    return tables
