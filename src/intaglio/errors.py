"""The error for bad input.

Every boundary (recipe, checkpoint directory, corpus, prompt, index, output directory) answers bad input with an
`IntaglioError`: one clear sentence with the field, the value and what is accepted. The command line prints it and exits
with 2; any other exception is a bug of Intaglio.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def printable(text: str) -> str:
    r"""Return text as a printable line.

    Line breaks, control characters and lone surrogates become escapes such as `\n`.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shorten(text: str, max_length: int = 60) -> str:
    """Return the text, truncated with an ellipsis where it is too long for a sentence."""
    return text if len(text) <= max_length else text[: max_length - 3] + "..."


class IntaglioError(ValueError):
    """Bad input or an impossible request; its message is one sentence for the user, unprintable characters escaped."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


class OtherRunError(IntaglioError):
    """A directory that holds another run than the one to resume."""


class DivergedError(IntaglioError):
    """A training whose loss, weights or scores are not finite."""


def did_you_mean(word: str, accepted: Iterable[str]) -> str:
    """Return the accepted names as the end of a sentence: the nearest, or all of them if few."""
    names = sorted(accepted)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"accepted: {', '.join(names)}" if names else "nothing is accepted here"


def first_line(error: BaseException) -> str:
    """Return an error's reason as a clause."""
    lines = str(error).strip().splitlines() or [""]
    # Validators put the reason on the second line; a bare key or number needs the error's name.
    text = " ".join(line.strip() for line in lines[:2]) if lines[0].endswith(":") else lines[0].rstrip(". ")
    return text if " " in text else f"{type(error).__name__}: {text}".removesuffix(": ")
