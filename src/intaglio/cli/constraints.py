"""Constraints from the options of `intaglio generate`."""

from __future__ import annotations

from pathlib import Path

from intaglio.constraints import Choices, Constraint, Grammar, JSONSchema, Regex, SQLSelect
from intaglio.errors import IntaglioError, first_line


def read_constraint(
    json_schema: Path | None, regex: str | None, grammar: Path | None, choices: str | None, sql: Path | None
) -> Constraint | None:
    """Return the constraint of the only option that is given, None without; it is checked before any model loads.

    Args:
        json_schema: file of a JSON Schema.
        regex: regular expression.
        grammar: file of a Lark grammar.
        choices: strings separated by commas.
        sql: file of CREATE statements.

    Raises:
        IntaglioError: several options, an unreadable file or a malformed constraint.
    """
    options = {"json-schema": json_schema, "regex": regex, "grammar": grammar, "choices": choices, "sql": sql}
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise IntaglioError(f"{' and '.join(given)} are given; give one constraint (in Python, a & b combines them)")
    if json_schema is not None:
        return JSONSchema(json_schema)
    if regex is not None:
        return Regex(regex)
    if grammar is not None:
        try:
            return Grammar(grammar.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise IntaglioError(f"the grammar {grammar} cannot be read: {first_line(error)}") from error
    if choices is not None:
        return Choices([choice.strip() for choice in choices.split(",")])
    return None if sql is None else SQLSelect.from_file(sql)
