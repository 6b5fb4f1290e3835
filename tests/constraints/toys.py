"""A small byte vocabulary, and outputs drawn under a constraint without a model."""

from __future__ import annotations

import random
import string

import numpy as np

from intaglio.constraints import Constraint, Prefix, Vocabulary
from intaglio.constraints.base import dead_end
from intaglio.errors import IntaglioError

PIECES = (b"th", b"SELECT", b" FROM", b'": ', b'{"', b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", b"12", b"true", b'", "')
"""Tokens of several characters and of parts of characters."""
LETTERS = Vocabulary([b"", b"th", b"a", b"b", b"c", b"aa"], [0])
"""Whole characters alone."""
VOCABULARY = Vocabulary([b"", b"", b"", *(c.encode() for c in string.printable), *PIECES], [2])


def draw(constraint: Constraint, seed: int, most: int = 200, vocabulary: Vocabulary = VOCABULARY) -> str | None:
    """Return a uniform walk's text, ended where it may, half of the time; None if it needs more tokens.

    Raises:
        IntaglioError: no token may follow.
    """
    rng, prefix = random.Random(seed), Prefix.empty(constraint, vocabulary)
    for _ in range(most):
        mask = prefix.mask()
        tokens = [int(t) for t in np.flatnonzero(mask) if prefix.state.exact or prefix.allows(int(t))]
        if not tokens:
            raise IntaglioError(dead_end(prefix))
        stops = [token for token in tokens if token in vocabulary.stops]
        prefix = prefix.extended(stops[0] if stops and rng.random() < 0.5 else rng.choice(tokens))
        if prefix.ended:
            return prefix.text
    return None
