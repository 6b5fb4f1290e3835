"""The one error a user can cause.

Every boundary (recipe, checkpoint directory, corpus, prompt, index, output directory) answers bad input by raising
`IntaglioError` with one clear sentence that names the field, the value and what would be accepted. The command line
prints that sentence and exits with 2; anything else that escapes is a defect of Intaglio.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def printable(text: str) -> str:
    """Return text as one line that any terminal can show: line breaks, control characters and halves of characters
    (lone surrogates) become escapes such as `\\n`.

    Args:
        text: anything, such as what a user wrote.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shorten(text: str, most: int = 60) -> str:
    """Return the text, or its front with three dots behind it where it is too long for a sentence.

    Args:
        text: what a user wrote.
        most: characters. Default 60.
    """
    return text if len(text) <= most else text[: most - 3] + "..."


class IntaglioError(ValueError):
    """Bad input or an impossible request; its message is one sentence, fit to be shown to a user as it stands.

    Args:
        sentence: the message; what cannot be printed in it is escaped.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


def did_you_mean(word: str, accepted: Iterable[str]) -> str:
    """Return what would have been accepted, as the end of a sentence: the nearest names, or all of them if few.

    Args:
        word: what the user wrote.
        accepted: every name that would have been right.
    """
    names = sorted(accepted)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"accepted: {', '.join(names)}" if names else "nothing is accepted here"


def first_line(error: BaseException) -> str:
    """The reason that an error gives, as a clause.

    Args:
        error: what a library raised.
    """
    lines = str(error).strip().splitlines() or [""]
    # Validators put the reason on the second line; a lone key or number says nothing without the error's name.
    text = " ".join(line.strip() for line in lines[:2]) if lines[0].endswith(":") else lines[0].rstrip(". ")
    return text if " " in text else f"{type(error).__name__}: {text}".removesuffix(": ")
