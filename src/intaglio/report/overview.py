"""The report of any run in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from intaglio.report.classifier import classifier_summary, classifier_tables
from intaglio.report.recommender import recommender_summary, recommender_tables
from intaglio.report.summary import summary
from intaglio.report.tables import carve_table


def overview(document: Mapping[str, Any]) -> tuple[list[Table], list[str]]:
    """Return the tables and sentences of a report, whichever kind of recipe made it."""
    if "rankings" in document:
        return recommender_tables(document), [recommender_summary(document)]
    if "by_class" in document:
        return classifier_tables(document), [classifier_summary(document)]
    return [carve_table(document)], [summary(document), *document["notes"]]
