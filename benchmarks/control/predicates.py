"""Constraints as plain Python functions of a text: what both sides of the benchmark check."""

from __future__ import annotations


def lipogram(text: str) -> bool:
    """Return whether a text does without the letter e, line breaks and doubled spaces."""
    return "e" not in text.lower() and "\n" not in text and "  " not in text and not text.startswith(" ")


def json_state(text: str) -> str | None:
    """Return the parser state of a flat JSON object without line breaks after a text; None if it is invalid."""
    state, digits = "start", False
    for char in text:
        if state.startswith("escape"):
            if char not in '"\\/bfnrt':
                return None
            state = state.removeprefix("escape ")
        elif state in ("key", "string"):
            if char == '"':
                state = "colon" if state == "key" else "after"
            elif char == "\\":
                state = f"escape {state}"
            elif char < " ":
                return None
        elif state == "number" and char.isascii() and char.isdigit():
            digits = True
        elif char == " " and state not in ("start", "number", "end"):
            continue
        else:
            is_value = char == "-" or (char.isascii() and char.isdigit())
            moves = {
                "start": {"{": "first"}, "first": {'"': "key", "}": "end"}, "next": {'"': "key"},
                "colon": {":": "value"}, "value": {'"': "string", **({char: "number"} if is_value else {})},
                "after": {",": "next", "}": "end"}, "end": {},
                "number": {" ": "after", ",": "next", "}": "end"} if digits else {},
            }  # fmt: skip
            if char not in moves[state]:
                return None
            state = moves[state][char]
            digits = state == "number" and char != "-"
    return state


def json_prefix(text: str) -> bool:
    """Return whether a text is the beginning of such an object."""
    return json_state(text) is not None


def json_complete(text: str) -> bool:
    """Return whether a text is a whole object."""
    return json_state(text) == "end"


PREDICATES = {"lipogram": (lipogram, lambda text: text.endswith(".")), "json": (json_prefix, json_complete)}
"""Prefix and complete by name."""
PROMPTS = {
    "lipogram": "Write a short story about a dog and a cat that play on a hill.",
    "json": "Describe Ann, a nurse of 34 from Paris, as a flat JSON object.",
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"enum": ["London", "Paris", "Rome"]},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
"""For grammar masks."""
