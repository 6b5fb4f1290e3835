"""Constraints whose membership llguidance decides: regular expressions, JSON Schemas, Lark grammars, choices.

Dimension letters: V vocabulary.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from llguidance import LLMatcher, regex_to_lark

from intaglio.constraints.base import Constraint, State
from intaglio.constraints.predicate import timed_call
from intaglio.constraints.vocabulary import Vocabulary
from intaglio.errors import IntaglioError, first_line, shorten

ALL_TOKENIZATIONS = '\n%llguidance { "no_forcing": true }\n'
"""Option of a grammar: where its next characters are fixed, masks allow every token that fits, not the longest alone.
So masks are membership, and the probability of a text sums over its tokenizations."""
CHECK_SECONDS = 1.0
"""Time limit of checks of a whole output; a regular expression may backtrack for ever."""


def _reason(error: str) -> str:
    """Return the reason in one of llguidance's messages, which quote the grammar around it."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    in_regex = re.search(r"\(in regex\): ([^;\n]+)", error)
    if in_regex and "error: " not in error:  # the pattern stands in front of the reason
        return in_regex[1]
    reasons = [line.partition("error: ")[2] for line in lines if "error: " in line]
    reason = (
        reasons[-1]
        if reasons
        else re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", lines[0] if lines else "no reason given")
    )
    return shorten(reason.rstrip(". "), 140)


class CompiledConstraint(Constraint):
    """A constraint with a grammar of llguidance; a subclass may add a check of whole outputs.

    Args:
        what: how messages name it.
        grammar: in llguidance's dialect of Lark.
    """

    def __init__(self, what: str, grammar: str) -> None:
        self.what = what
        self.grammar = grammar + ALL_TOKENIZATIONS
        if (error := LLMatcher.validate_grammar(self.grammar)) and not error.startswith("WARNING"):
            raise IntaglioError(f"{what} is not accepted: {_reason(error)}")

    def start(self, vocabulary: Vocabulary) -> State:
        """Return the state of the empty prefix.

        Raises:
            IntaglioError: llguidance cannot compile the grammar for this vocabulary.
        """
        matcher = LLMatcher(vocabulary.tokenizer, self.grammar, log_level=0)
        if matcher.is_error():
            raise IntaglioError(f"{self.what} is not accepted: {_reason(matcher.get_error())}")
        return _GrammarState(self, vocabulary, matcher, b"")

    def check(self, text: str) -> bool:
        """Return whether a whole output that the grammar accepts is valid."""
        return True


class _GrammarState(State):
    exact = True

    def __init__(self, constraint: CompiledConstraint, vocabulary: Vocabulary, matcher: LLMatcher, data: bytes) -> None:
        self._constraint = constraint
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._data = data

    def mask(self) -> np.ndarray:
        """Return the tokens that the grammar allows."""
        size = len(self._vocabulary)
        if self._matcher.is_stopped():
            return np.zeros(size, dtype=bool)
        matcher = self._matcher.deep_copy()  # a mask without tokens ends a matcher, accepting or not
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error() and "NoExtension" in matcher.get_error():
            return np.zeros(size, dtype=bool)
        if matcher.is_error():
            reason = _reason(matcher.get_error())
            raise IntaglioError(f"{self._constraint.what} is too complex to follow here: {reason}")
        mask_V: np.ndarray = np.unpackbits(bits, count=size, bitorder="little").astype(bool)
        return mask_V

    def allows(self, token: int) -> bool:
        """Return whether the grammar allows a token."""
        return not self._matcher.is_stopped() and self._matcher.validate_tokens([token]) == 1

    def complete(self) -> bool:
        """Return whether the grammar accepts the whole text, and it is valid."""
        if not self._matcher.is_accepting():
            return False
        text = self._vocabulary.text(self._data)
        try:
            return text is not None and bool(timed_call(self._constraint.check, text, CHECK_SECONDS))
        except TimeoutError:
            raise IntaglioError(
                f"checking {shorten(repr(text))} took longer than {CHECK_SECONDS:g} s; simplify {self._constraint.what}"
            ) from None

    def extended(self, token: int) -> State:
        """Return the state after a token."""
        matcher = self._matcher.deep_copy()
        if not matcher.consume_token(token):
            raise IntaglioError(f"{self._constraint.what} does not allow the token {token}")
        return _GrammarState(self._constraint, self._vocabulary, matcher, self._data + self._vocabulary.forms[token])


class Grammar(CompiledConstraint):
    """The strings of a context-free grammar in llguidance's dialect of Lark.

    Args:
        text: the grammar; its rule `start` derives whole outputs.

    Raises:
        IntaglioError: the grammar is malformed.
    """

    def __init__(self, text: str) -> None:
        super().__init__("the grammar", text)


class Regex(CompiledConstraint):
    r"""The strings that a regular expression matches from beginning to end.

    `\d`, `\w` and `\s` are ASCII classes, as with Python's `re.ASCII`.

    Args:
        pattern: a pattern that both `re` and llguidance read: no look-around, backreferences or word boundaries.

    Raises:
        IntaglioError: another pattern.
    """

    def __init__(self, pattern: str) -> None:
        what = f"the regular expression {shorten(pattern)!r}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # set operations, which `re` reads otherwise
                self._pattern = re.compile(pattern, re.ASCII)
            lark = regex_to_lark(pattern, "dws")
        # ValueError: flags that contradict ASCII, lone surrogates.
        except (re.error, FutureWarning, DeprecationWarning, OverflowError, RecursionError, ValueError) as error:
            raise IntaglioError(f"{what} is malformed: {first_line(error)}") from error
        super().__init__(what, f"start: /{lark}/")

    def check(self, text: str) -> bool:
        """Return whether Python's `re` matches the whole text."""
        return self._pattern.fullmatch(text) is not None


class Choices(CompiledConstraint):
    """A few given strings.

    Args:
        choices: at least one, none of them empty.

    Raises:
        IntaglioError: no choices, or an empty one.
    """

    def __init__(self, choices: Sequence[str]) -> None:
        if not choices or not all(choices):
            raise IntaglioError(f"choices are {list(choices)!r}; at least one string, none of them empty, is accepted")
        alternatives = " | ".join(json.dumps(choice) for choice in dict.fromkeys(choices))
        super().__init__("the list of choices", f"start: {alternatives}")


class JSONSchema(CompiledConstraint):
    """The JSON texts that are valid under a JSON Schema.

    Texts have the spacing of `json.dumps`, `{"a": 1, "b": [2, 3]}`, so that they cannot be padded without end.
    llguidance masks tokens; a whole text is checked by `jsonschema` as well.

    Args:
        schema: the schema, or the path of its file.
        flexible_whitespace: whether any whitespace is allowed between the parts of a text. Default False.

    Raises:
        IntaglioError: an unreadable file, a malformed schema, references to other documents, or keywords that cannot be
            followed token by token.
    """

    def __init__(
        self, schema: Mapping[str, Any] | Literal[True] | str | os.PathLike[str], flexible_whitespace: bool = False
    ) -> None:
        what = "the JSON Schema"
        if isinstance(schema, str | os.PathLike):
            what = f"the JSON Schema {os.fspath(schema)}"
            schema = _read_json(Path(schema), what)
        schema = {} if schema is True else schema
        if not isinstance(schema, Mapping):
            raise IntaglioError(f"{what} is {shorten(json.dumps(schema))}; an object is accepted")
        for reference in _references(schema):
            if not reference.startswith("#"):
                raise IntaglioError(
                    f"{what} refers to {shorten(reference)!r}; only references inside the schema (#...) are accepted"
                )
        if not isinstance(schema.get("$schema", ""), str):
            raise IntaglioError(f"{what} is malformed at $.$schema: {shorten(repr(schema['$schema']))} is not a string")
        validator = validator_for(schema)
        try:
            validator.check_schema(dict(schema))
        except SchemaError as error:
            raise IntaglioError(f"{what} is malformed at {error.json_path}: {shorten(error.message, 140)}") from error
        self._validator = validator(schema)
        separators = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        options = {"whitespace_flexible": True} if flexible_whitespace else separators
        super().__init__(what, f"start: %json {json.dumps({**schema, 'x-guidance': options})}")

    def check(self, text: str) -> bool:
        """Return whether `jsonschema` finds the text valid."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        return bool(self._validator.is_valid(value))


def _read_json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise IntaglioError(f"{what} cannot be read: {first_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise IntaglioError(f"{what} is not JSON: {first_line(error)}") from error


def _references(schema: Any) -> Iterator[str]:
    """Yield the references in a schema; values that are data have none."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            for key, value in part.items():
                if key in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(value, str):
                    yield value
                elif key not in ("const", "enum", "default", "examples"):
                    waiting.append(value)
        elif isinstance(part, list):
            waiting.extend(part)
