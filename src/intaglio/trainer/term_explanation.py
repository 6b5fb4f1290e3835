"""Learned-sparse vectors in words: the terms of a text, and what each term adds to a score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.trainer.encoder_training import EncoderObjective


@dataclass(frozen=True)
class Term:
    """A token of the vocabulary with its weight in a vector, or its part of a score."""

    id: int
    token: str
    weight: float


@dataclass(frozen=True)
class Explanation:
    """The score of two texts and its terms, the largest first, whose weights sum to it exactly by `math.fsum`."""

    score: float
    terms: tuple[Term, ...]


def terms_of(method: EncoderObjective, checkpoint: Checkpoint, text: str, side: str = "document") -> tuple[Term, ...]:
    """Return the terms of a text with nonzero weights, the largest first.

    Raises:
        IntaglioError: the encoder is dense.
    """
    _check_sparse(method)
    return _terms(checkpoint, method.encode(checkpoint, [text], side)[0])


def explain(method: EncoderObjective, checkpoint: Checkpoint, query: str, document: str) -> Explanation:
    """Return the score of a query and a document, and what each term adds to it: w_q[v] w_d[v].

    Raises:
        IntaglioError: the encoder is dense.
    """
    _check_sparse(method)
    (query_V,), (document_V,) = (
        method.encode(checkpoint, [text], name) for name, text in (("query", query), ("document", document))
    )
    terms = _terms(checkpoint, query_V.double() * document_V.double())
    return Explanation(math.fsum(term.weight for term in terms), terms)


def _check_sparse(method: EncoderObjective) -> None:
    if not method.sparse:
        raise IntaglioError(f"{method.slug} makes dense vectors, whose dimensions are no words")


def _terms(checkpoint: Checkpoint, weights_V: Any) -> tuple[Term, ...]:
    ids = weights_V.nonzero().flatten().tolist()
    words = checkpoint.tokenizer.convert_ids_to_tokens(ids)
    made = (Term(number, str(word), float(weights_V[number])) for number, word in zip(ids, words, strict=True))
    return tuple(sorted(made, key=lambda term: -term.weight))
