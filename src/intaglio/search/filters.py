"""Metadata conditions as SQL."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from intaglio.errors import IntaglioError

_CONDITION = re.compile(r"\s*([\w.:-]+?)\s*(!=|>=|<=|~=|=|>|<)\s*(.*?)\s*", re.S)
_OPERATORS = ("=", "!=", ">=", "<=", ">", "<", "~=")


def parse(filters: Mapping[str, Any] | Sequence[str]) -> list[tuple[str, str, Any]]:
    """Return (field, operator, value) of each condition.

    Raises:
        IntaglioError: a condition has no operator.
    """
    if isinstance(filters, Mapping):
        return [(str(name), "=", value) for name, value in filters.items()]
    result = []
    for text in [filters] if isinstance(filters, str) else filters:
        match = _CONDITION.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise IntaglioError(
                f"the filter {text!r} is no condition; accepted: field OP value, OP of {' '.join(_OPERATORS)}"
            )
        result.append((match[1], match[2], match[3]))
    return result


def to_sql(filters: Mapping[str, Any] | Sequence[str]) -> tuple[str, list[Any]]:
    """Return a WHERE clause over `documents`, and its parameters.

    `=` and `!=` compare as text; the order compares as numbers where both sides are numbers, else as text. A document
    without the field meets no condition but `!=`.
    """
    clauses, parameters = [], []
    for name, operator, value in parse(filters):
        if name in ("id", "title"):
            column, given = name, []
        else:
            # Unlike json_extract, ->> takes a plain key, dots and quotes included.
            column, given = "(metadata ->> ?)", [name]
        if isinstance(value, bool):
            value = int(value)  # as ->> returns it
        number = _number(value)
        if operator in ("=", "!="):
            sign = "IS" if operator == "=" else "IS NOT"
            clauses.append(f"CAST({column} AS TEXT) {sign} ?")
            value = None if value is None else str(value)
        elif operator == "~=":
            clauses.append(f"instr(lower({column}), lower(?)) > 0")
            value = str(value)
        elif number is None:
            clauses.append(f"CAST({column} AS TEXT) {operator} ?")
            value = str(value)
        else:
            # Rows of CSV hold numbers as text.
            clauses.append(
                f"(CASE WHEN {column} GLOB '*[0-9]*' AND NOT {column} GLOB '*[^-+.eE0-9]*'"
                f" THEN CAST({column} AS REAL) END) {operator} ?"
            )
            given, value = given * 3, number
        parameters += [*given, value]
    return " AND ".join(clauses) or "1", parameters


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


__all__ = ["parse", "to_sql"]
