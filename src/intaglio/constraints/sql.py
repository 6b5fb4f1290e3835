"""SELECT statements of SQLite over the tables of a schema."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from pathlib import Path

from intaglio.constraints.grammar import CompiledConstraint
from intaglio.errors import IntaglioError, first_line

MAX_JOINED = 12
"""Most tables of a schema whose pairs are joined; the grammar grows with their square."""

_CREATE = frozenset(
    getattr(sqlite3, f"SQLITE_{action}")
    for action in ("CREATE_TABLE", "CREATE_INDEX", "CREATE_VIEW", "READ", "FUNCTION", "REINDEX", "SELECT")
)
_READ_ONLY = frozenset((sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION))

# llguidance's lexer takes the longest match and never goes back, so words and spaces are lexemes of their own.
_SCOPE = """
select{s}: "SELECT" " " ("DISTINCT" " ")? items{s} " " "FROM" " " {tables} where{s}? (group{s} | order{s})? limit?
items{s}: "*" | item{s} ("," " " item{s})*
item{s}: column{s} | aggregate{s}
aggregate{s}: "COUNT" "(" "*" ")" | function "(" ("DISTINCT" " ")? column{s} ")"
where{s}: " " "WHERE" " " condition{s}
condition{s}: term{s} (" " ("AND" | "OR") " " term{s})*
term{s}: test{s} | ("NOT" " ")? "(" condition{s} ")"
test{s}: column{s} " " (COMPARISON " " (literal | column{s}) | "IS" " " ("NOT" " ")? "NULL" | ("NOT" " ")? member)
group{s}: " " "GROUP" " " "BY" " " column{s} ("," " " column{s})* having{s}? ranked{s}?
having{s}: " " "HAVING" " " aggregate{s} " " COMPARISON " " literal
order{s}: " " "ORDER" " " "BY" " " key{s} ("," " " key{s})*
key{s}: column{s} (" " ("ASC" | "DESC"))?
ranked{s}: " " "ORDER" " " "BY" " " rank{s} ("," " " rank{s})*
rank{s}: item{s} (" " ("ASC" | "DESC"))?
column{s}: {columns}
"""
_SHARED = r"""
member: "LIKE" " " STRING | "BETWEEN" " " literal " " "AND" " " literal | "IN" " " "(" literal ("," " " literal)* ")"
limit: " " "LIMIT" " " INTEGER
literal: NUMBER | STRING
function: "COUNT" | "SUM" | "AVG" | "MIN" | "MAX"
COMPARISON: "=" | "!=" | "<" | "<=" | ">" | ">="
INTEGER: /[1-9][0-9]{0,8}/
NUMBER: /-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?/
STRING: /'([^'\n\x00]|''){0,200}'/
"""


class SQLSelect(CompiledConstraint):
    """SELECT statements over the tables and columns of an SQLite schema.

    The subset: columns and aggregates, DISTINCT, one table or an inner join of two on equal columns, WHERE with AND,
    OR, NOT, comparisons, LIKE, IN, BETWEEN and IS NULL, GROUP BY with HAVING, ORDER BY, LIMIT; keywords in capitals,
    single spaces. Statements name only columns that their tables have, and SQLite itself prepares each whole one.

    Args:
        schema: CREATE statements.
        name: how messages name the schema. Default `the SQL schema`.

    Raises:
        IntaglioError: statements that SQLite refuses or that do not create tables, views or indexes, or no table.
    """

    def __init__(self, schema: str, name: str = "the SQL schema") -> None:
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        self._connection.set_authorizer(_only_create)
        try:
            self._connection.executescript(schema)
            self._connection.set_authorizer(None)
            self.tables = self._read_tables()
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise IntaglioError(
                f"{name} is not accepted: {first_line(error)}; CREATE TABLE, VIEW and INDEX statements are"
            ) from error
        if not self.tables:
            raise IntaglioError(f"{name} creates no table; at least one CREATE TABLE statement is needed")
        self._connection.set_authorizer(
            lambda action, *_: sqlite3.SQLITE_OK if action in _READ_ONLY else sqlite3.SQLITE_DENY
        )
        super().__init__(name, self.lark())

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> SQLSelect:
        """Read the schema from a file.

        Raises:
            IntaglioError: it cannot be read, or is no schema.
        """
        name = f"the SQL schema {os.fspath(path)}"
        try:
            return cls(Path(path).read_text(encoding="utf-8"), name)
        except (OSError, UnicodeDecodeError) as error:
            raise IntaglioError(f"{name} cannot be read: {first_line(error)}") from error

    def _read_tables(self) -> dict[str, list[str]]:
        """Return the columns of each table and view, quoted where necessary."""
        rows = self._connection.execute(
            "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%' ORDER BY rowid"
        ).fetchall()
        tables = {}
        for (table,) in rows:
            names = self._connection.execute("SELECT name FROM pragma_table_info(?)", (table,)).fetchall()
            tables[self._quoted(table)] = [self._quoted(name) for (name,) in names]
        return tables

    def _quoted(self, name: str) -> str:
        plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)
        try:
            if plain:
                self._connection.execute(f"SELECT 1 AS {name}")  # fails for a keyword
                return name
        except sqlite3.Error:
            pass
        return '"' + name.replace('"', '""') + '"'

    def lark(self) -> str:
        """Return the grammar: the rules of one scope for each table, and for each pair of tables."""
        scopes = [(json.dumps(table), columns) for table, columns in self.tables.items()]
        if len(self.tables) <= MAX_JOINED:
            for left, right in ((a, b) for a in self.tables for b in self.tables if a != b):
                of_left, of_right = ([f"{table}.{name}" for name in self.tables[table]] for table in (left, right))
                words = " ".join(f'{json.dumps(word)} " "' for word in (left, "JOIN", right, "ON"))
                on = f'({_alternatives(of_left)}) " " "=" " " ({_alternatives(of_right)})'
                scopes.append((f"{words} {on}", of_left + of_right))
        rules = [
            _SCOPE.format(s=s, tables=tables, columns=_alternatives(columns))
            for s, (tables, columns) in enumerate(scopes)
        ]
        return "start: " + " | ".join(f"select{s}" for s in range(len(scopes))) + "".join(rules) + _SHARED

    def check(self, text: str) -> bool:
        """Return whether SQLite prepares the statement."""
        try:
            self._connection.execute(f"EXPLAIN {text}")
        except (sqlite3.Error, sqlite3.Warning, ValueError):
            return False
        return True


def _only_create(action: int, first: str | None, *_: str | None) -> int:
    """Allow CREATE statements alone: no files, pragmas or data."""
    bookkeeping = action in (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE) and (first or "").startswith("sqlite_")
    return sqlite3.SQLITE_OK if bookkeeping or action in _CREATE else sqlite3.SQLITE_DENY


def _alternatives(names: list[str]) -> str:
    return " | ".join(json.dumps(name) for name in names)
