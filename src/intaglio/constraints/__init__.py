"""Constraints on generated text, composable by `&`.

    from intaglio.constraints import JSONSchema, Length, Predicate, Regex

    Regex(r"[a-z]+@[a-z]+\\.com") & Length(maximum=40)

- `base.py`: `Constraint`, its states, `&`, and `Prefix`, an output with its end
- `vocabulary.py`: `Vocabulary`, the byte forms of a tokenizer's tokens
- `grammar.py`: `Regex`, `JSONSchema`, `Grammar`, `Choices`, decided by llguidance; `sql.py`: `SQLSelect`
- `predicate.py`: `Predicate` (Python functions with a time limit) and `Length`
- `processor.py`: `ConstraintProcessor` for stock `generate` and the speculative loop
"""

from __future__ import annotations

from intaglio.constraints.base import Constraint, Intersection, Prefix, State, dead_end
from intaglio.constraints.grammar import Choices, Grammar, JSONSchema, Regex
from intaglio.constraints.predicate import Length, Predicate
from intaglio.constraints.processor import ConstraintProcessor, check_output
from intaglio.constraints.sql import SQLSelect
from intaglio.constraints.vocabulary import Vocabulary

__all__ = [
    "Choices",
    "Constraint",
    "ConstraintProcessor",
    "Grammar",
    "Intersection",
    "JSONSchema",
    "Length",
    "Predicate",
    "Prefix",
    "Regex",
    "SQLSelect",
    "State",
    "Vocabulary",
    "check_output",
    "dead_end",
]
