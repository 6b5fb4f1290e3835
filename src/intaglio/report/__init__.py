"""Measurement documents -> one self-contained HTML page, tables for the terminal, one sentence.

`document` says what a document holds and checks it; `numbers` turns values and their changes into words; `sentence`,
`tables` and `page` tell a document in a line, in the terminal and in a browser.
"""

from intaglio.report.formatting import MEASURES, Cell, Change, Measure, Row, rows
from intaglio.report.html import carve_page, compare_page, demo_page, training_page
from intaglio.report.schema import BAKED, FORMAT, LIVE, ZEROS
from intaglio.report.summary import summary
from intaglio.report.tables import carve_table, compare_table, demo_chart, demo_table

__all__ = [
    "BAKED",
    "FORMAT",
    "LIVE",
    "MEASURES",
    "ZEROS",
    "Cell",
    "Change",
    "Measure",
    "Row",
    "carve_page",
    "carve_table",
    "compare_page",
    "compare_table",
    "demo_chart",
    "demo_page",
    "demo_table",
    "rows",
    "summary",
    "training_page",
]
