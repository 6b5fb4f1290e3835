"""Reports: measurement documents as a self-contained HTML page, terminal tables and a summary sentence.

`schema` describes and checks the documents; `formatting` formats values and their changes; `summary`, `tables` and
`html` render a document as a line, in the terminal and in a browser; `recommender` and `classifier` do so for theirs.
"""

from intaglio.report.classifier import classifier_page, classifier_summary, classifier_tables
from intaglio.report.diagnostics import diagnostics_page, diagnostics_tables
from intaglio.report.features import features_page
from intaglio.report.formatting import MEASURES, Cell, Change, Measure, Row, rows
from intaglio.report.html import carve_page, compare_page, demo_page, trained_page, training_page
from intaglio.report.overview import overview
from intaglio.report.recommender import (
    recommender_page,
    recommender_section,
    recommender_summary,
    recommender_tables,
)
from intaglio.report.schema import BAKED, FORMAT, LIVE, TIE, ZEROS
from intaglio.report.spectrum import short_name, spectrum_page, spectrum_rows, spectrum_summary
from intaglio.report.summary import summary
from intaglio.report.tables import carve_table, compare_table, demo_chart, demo_table

__all__ = [
    "BAKED",
    "FORMAT",
    "LIVE",
    "MEASURES",
    "TIE",
    "ZEROS",
    "Cell",
    "Change",
    "Measure",
    "Row",
    "carve_page",
    "carve_table",
    "classifier_page",
    "classifier_summary",
    "classifier_tables",
    "compare_page",
    "compare_table",
    "demo_chart",
    "demo_page",
    "demo_table",
    "diagnostics_page",
    "diagnostics_tables",
    "features_page",
    "overview",
    "recommender_page",
    "recommender_section",
    "recommender_summary",
    "recommender_tables",
    "rows",
    "short_name",
    "spectrum_page",
    "spectrum_rows",
    "spectrum_summary",
    "summary",
    "trained_page",
    "training_page",
]
