"""Retrievers for `Retrieve`: encoders trained on the pairs of a test bed, pretrained encoders as they are, and BM25."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from intaglio.checkpoint.soup import average
from intaglio.data.text_pairs import TextPair
from intaglio.evidence.designs.retrieve import DOCUMENT_TERMS, QUERY_TERMS, RetrieveContext, Scores
from intaglio.search import Index, load_encoder, mine_hard_negatives
from intaglio.trainer import train
from intaglio.trainer.encoder_training import EncoderObjective
from intaglio.trainer.mining import Mining

MEMBER_SEEDS = 2**30
"""Distance of the seeds of a soup's members, beyond those of a claim's units."""
Search = Callable[[Mapping[str, str], Mapping[str, str]], Scores]


def trained(
    context: RetrieveContext,
    *,
    objective: EncoderObjective,
    model: str,
    steps: int | None = None,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    start: Callable[[Any, str, int], Any] | None = None,
    light_encoder: str | None = None,
    negatives: Mining | None = None,
    members: int = 1,
    **fields: Any,
) -> Search:
    """Train an encoder on the unit's pairs from a pretrained model, and return its search.

    Args:
        context: test bed and key.
        objective: the method, with its fields.
        model: `llama`, `modernbert` or `bert`.
        steps: optimizer steps. Default: the test bed's `tuning_steps`.
        learning_rate: the highest. Default 1e-3.
        batch_size: pairs of a step. Default 16.
        start: gives the model `(bed, model, seed)`. Default: the test bed's pretrained model.
        light_encoder: model of the test bed that is the objective's `light_encoder`. Default: none.
        negatives: mines hard negatives of the pairs. Default: those of the batch alone.
        members: trainings with seeds of their own whose weights are averaged. Default 1.
        fields: tuned fields of the method.
    """
    bed, seed = context.bed, context.key.seed
    pairs = [TextPair(pair.query, pair.document) for pair in bed.training(seed)]
    if negatives is not None:
        pairs = mine_hard_negatives(pairs, negatives)
    rows = [pair.row() for pair in pairs]
    arguments: dict[str, Any] = {
        "steps": steps or bed.tuning_steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
    }
    states = []
    with tempfile.TemporaryDirectory() as scratch:
        if light_encoder is not None:
            fields["light_encoder"] = str(bed.load(light_encoder).save(f"{scratch}/{light_encoder}"))
        for member in range(members):
            method = type(objective)(**{**objective.model_dump(), **fields})
            checkpoint = bed.load(model) if start is None else start(bed, model, seed)
            own_seed = (seed + member * MEMBER_SEEDS) % 2**32
            train(checkpoint, rows, objective=method, warmup=0.1, seed=own_seed, **arguments)
            states.append(checkpoint.model.state_dict())
    if members > 1:
        if len(method.modules()):
            raise ValueError(f"{method.slug} has modules of its own, which are not averaged")
        checkpoint.model.load_state_dict(average(states))

    def search(queries: Mapping[str, str], documents: Mapping[str, str]) -> Scores:
        query_QD = method.encode(checkpoint, list(queries.values()), "query")
        document_ND = method.encode(checkpoint, list(documents.values()), "document")
        if method.sparse:
            for metric, vectors in ((QUERY_TERMS, query_QD), (DOCUMENT_TERMS, document_ND)):
                context.values[metric.name] = float((vectors != 0).sum(1).float().mean())
        rows = (query_QD @ document_ND.T).tolist()
        return {name: dict(zip(documents, row, strict=True)) for name, row in zip(queries, rows, strict=True)}

    return search


def as_it_is(context: RetrieveContext, *, encoder: str | None = None, **tuned: Any) -> Search:
    """Return the search of an index with a pretrained encoder, or BM25; settings tuned for other arms are ignored."""

    def search(queries: Mapping[str, str], documents: Mapping[str, str]) -> Scores:
        loaded = None if encoder is None else load_encoder(encoder)
        kind = "bm25" if loaded is None else loaded.kind
        with (
            tempfile.TemporaryDirectory() as scratch,
            Index.create(Path(scratch) / "index", kind=kind, encoder=loaded, chunk=0) as index,
        ):
            index.add({"id": name, "text": text} for name, text in documents.items())
            hits = {name: index.search(text, len(documents)) for name, text in queries.items()}
        return {name: {hit.id: hit.score for hit in own} for name, own in hits.items()}

    return search
