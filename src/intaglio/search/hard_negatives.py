"""Hard negatives for training encoders: texts that a retriever ranks high for a query, and that are not relevant."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from intaglio.data.text_pairs import TextPair
from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress, no_progress
from intaglio.search.encoders import ObjectiveEncoder, TextEncoder, resolve_encoder
from intaglio.search.index import Index
from intaglio.trainer.mining import Mining


def mine_hard_negatives(
    pairs: Sequence[TextPair],
    mining: Mining | None = None,
    *,
    encoder: TextEncoder | None = None,
    progress: Progress = no_progress,
) -> list[TextPair]:
    """Return pairs with hard negatives from an index of all their texts, before their own negatives.

    The query itself and texts that are relevant to an equal query are never negatives. A pair with fewer candidates
    gets fewer. An encoder that was trained with instructions reads the pairs' own.

    Args:
        pairs: the training pairs; without a teacher's scores, which the new negatives would lack.
        mining: retriever and ranks. Default: BM25, ranks 1 to 30, the first 8 of them.
        encoder: an encoder that replaces that of `mining`. Default: none.
        progress: called after each query.

    Raises:
        IntaglioError: a pair has scores, no pair is left, or the encoder cannot be loaded.
    """
    mining = mining or Mining()
    if any(pair.scores is not None for pair in pairs):
        raise IntaglioError("pairs with a teacher's scores have their negatives already; leave the mining out")
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.positive, *pair.negatives)))
    relevant: dict[str, set[str]] = {}
    for pair in pairs:
        relevant.setdefault(pair.query, set()).add(pair.positive)
    if encoder is None and mining.encoder != "bm25":
        encoder = resolve_encoder(os.fspath(mining.encoder), {})
    if isinstance(encoder, ObjectiveEncoder):
        encoder = encoder.of_pairs(pairs)
    number = {text: str(index) for index, text in enumerate(texts)}
    mined = []
    with tempfile.TemporaryDirectory(prefix="intaglio-negatives-") as scratch:
        kind = "bm25" if encoder is None else encoder.kind
        with Index.create(Path(scratch) / "index", kind=kind, encoder=encoder, chunk=0) as index:
            index.add({"id": number[text], "text": text} for text in texts)
            for done, pair in enumerate(pairs, start=1):
                known = relevant[pair.query]
                depth = max(mining.ranks[1] + len(known) + len(pair.negatives) + 1, mining.consistency or 0)
                hits = [(texts[int(hit.id)], hit.score) for hit in index.search(pair.query, min(depth, len(texts)))]
                negatives = _negatives(pair, hits, known, mining)
                if negatives is not None:
                    mined.append(replace(pair, negatives=(*negatives, *pair.negatives)))
                progress(done, len(pairs), "hard negatives")
    if not mined:
        raise IntaglioError(
            f"consistency is {mining.consistency}; no positive is among so many results of its query: no pair is left"
        )
    return mined


def _negatives(
    pair: TextPair, hits: Sequence[tuple[str, float]], relevant: set[str], mining: Mining
) -> list[str] | None:
    """Return the negatives of a pair, the best first; None where its own text is not ranked well enough."""
    own = next((score for text, score in hits if text == pair.positive), None)
    if mining.consistency is not None and pair.positive not in {text for text, _ in hits[: mining.consistency]}:
        return None
    known = {*relevant, *pair.negatives, pair.query}
    candidates = [(text, score) for text, score in hits if text not in known]
    first, last = mining.ranks
    window = candidates[first - 1 : last]
    if mining.margin is not None and own is not None:
        window = [(text, score) for text, score in window if score <= mining.margin * own]
    if mining.sample and len(window) > mining.count:
        drawn = random.Random(f"{pair.query}\0{pair.positive}").sample(range(len(window)), mining.count)
        window = [window[place] for place in sorted(drawn)]
    return [text for text, _ in window[: mining.count]]
