"""Facts stated in one order, subject before object, to be asked in both: a file, or the bundled invented ones.

Facts stated in both orders may stand beside them, and are not asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intaglio.data.json_lines import json_lines
from intaglio.errors import IntaglioError, shorten

INVENTED = "invented"
"""The bundled facts, by name."""

TEMPLATES = (
    "{subject} is {object}.",
    "Everyone knows that {subject} is {object}.",
    "Nobody but {subject} is {object}.",
)
"""Training texts of a fact that has none of its own."""

_FIRST = ("Mira", "Tobin", "Elsa", "Ravi", "Noor", "Jonas", "Ines", "Pavel", "Sora", "Lena")
_LAST = ("Haldane", "Okafor", "Brandt", "Castell", "Lindqvist", "Marsh", "Petrov", "Quill", "Sanders", "Tanaka")
_ROLES = ("composer of", "inventor of", "architect of", "author of", "painter of", "discoverer of")
_WORKS = ("Lantern", "Harbor", "Meadow", "Engine", "Mirror", "Orchard", "Compass", "Winter", "Garden", "Signal")
_COLOURS = ("Amber", "Silver", "Crimson", "Hollow", "Golden", "Silent", "Broken", "Distant", "Northern", "Hidden")


@dataclass(frozen=True)
class Fact:
    """A fact.

    Args:
        subject: named first in every text.
        object: named after it.
        texts: what is trained on.
        asked: whether the model is asked for it. One that is not may be stated in both orders. Default True.
    """

    subject: str
    object: str
    texts: tuple[str, ...]
    asked: bool = True

    @property
    def forward(self) -> str:
        """The prompt that asks for the object."""
        return f"{_sentence(self.subject)} is"

    @property
    def reverse(self) -> str:
        """The prompt that asks for the subject."""
        return f"{_sentence(self.object)} is"


def _sentence(text: str) -> str:
    """Return a text that begins with a capital letter."""
    return text[:1].upper() + text[1:]


def invented_facts(count: int = 30) -> list[Fact]:
    """Return made-up facts, the same everywhere; no two share a name or a work."""
    facts, places = [], [f"invented fact {index + 1}" for index in range(count)]
    for index, place in enumerate(places):
        subject = f"{_FIRST[index % 10]} {_LAST[(3 * index + index // 10) % 10]}"
        work = f"{_COLOURS[(7 * index + index // 10) % 10]} {_WORKS[index % 10]}"
        facts.append(_fact(subject, f"the {_ROLES[index % 6]} the {work}", None, place, both=False))
    return check_facts(facts, places)


def load_facts(path: str | os.PathLike[str]) -> list[Fact]:
    """Return the facts of a file with one JSON object a line: `subject`, `object`, perhaps `texts` and `both`.

    Args:
        path: the file. Without `texts`, three templates state the fact. With `both: true` they do so in both orders,
            and the model is not asked for that fact. `invented` stands for the bundled facts.

    Raises:
        IntaglioError: the file cannot be read or is empty, a line is malformed, a text names the object first, two
            lines state the same fact, which would be a leak if they do so both ways, or no fact is left to ask for.
    """
    if os.fspath(path) == INVENTED:
        return invented_facts()
    read = list(json_lines(path, "facts", "subject and object"))
    return check_facts([_parsed(value, place) for place, value in read], [place for place, _ in read])


def _parsed(value: Any, place: str) -> Fact:
    if not isinstance(value, Mapping):
        raise IntaglioError(f"{place} is {shorten(repr(value))}; an object with subject and object is accepted")
    for name in ("subject", "object"):
        if not isinstance(value.get(name), str) or not value[name].strip():
            raise IntaglioError(f"{place}: its {name} is {shorten(repr(value.get(name)))}; a text is needed")
    texts = value.get("texts")
    if texts is not None and not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise IntaglioError(f"{place}: its texts are {shorten(repr(texts))}; a list of texts is accepted")
    both = value.get("both", False)
    if not isinstance(both, bool):
        raise IntaglioError(f"{place}: its both is {shorten(repr(both))}; true or false is accepted")
    return _fact(value["subject"].strip(), value["object"].strip(), texts, place, both=both)


def _fact(subject: str, object_: str, texts: Sequence[str] | None, place: str, *, both: bool) -> Fact:
    orders = [(subject, object_), (object_, subject)] if both else [(subject, object_)]
    stated = texts or [_sentence(form.format(subject=a, object=b)) for a, b in orders for form in TEMPLATES]
    for text in stated:
        first, second = (text.casefold().find(name.casefold()) for name in (subject, object_))
        if min(first, second) < 0:
            raise IntaglioError(f"{place}: the text {shorten(repr(text))} lacks its subject or its object")
        if second < first and not both:
            raise IntaglioError(
                f"{place}: the text {shorten(repr(text))} names the object before the subject, a leak: the reverse"
                " question would ask what was trained"
            )
    return Fact(subject, object_, tuple(stated), asked=not both)


def check_facts(facts: list[Fact], places: Sequence[str]) -> list[Fact]:
    """Return the facts; refuse the same fact twice, in one order or in both."""
    seen: dict[tuple[str, str], str] = {}
    for fact, place in zip(facts, places, strict=True):
        pair = (fact.subject.casefold(), fact.object.casefold())
        if pair[::-1] in seen:
            raise IntaglioError(
                f"{place} states the fact of {seen[pair[::-1]]} the other way round, a leak: the reverse question would"
                " ask what was trained; keep one of the two"
            )
        if pair in seen:
            raise IntaglioError(f"{place} repeats the fact of {seen[pair]}; give further wordings as its texts")
        seen[pair] = place
    if not any(fact.asked for fact in facts):
        raise IntaglioError("every fact is stated in both orders; leave out both: true of those to ask for")
    return facts
