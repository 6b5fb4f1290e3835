"""Recipes on interactions: train a recommender, rank the held-out items, write the result."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from intaglio import atomic_io, report
from intaglio.checkpoint import Checkpoint, load
from intaglio.checkpoint.resolve import ITEMS
from intaglio.data.interactions import load_interactions
from intaglio.data.item_sequences import ItemSequences, Question
from intaglio.environment import versions
from intaglio.measures.ranking import RankingProtocol, ranking_metrics
from intaglio.methods.base import Progress
from intaglio.methods.objectives.next_item import NextItemModel, Popularity, item_names, new_recommender, ranks
from intaglio.recipe.schema import Recipe
from intaglio.recipe.single_step import SingleStep, run_single_step
from intaglio.recipe.source import IMAGE_FIELDS, RunSpec
from intaglio.trainer.recipe_step import Train

PROTOCOLS: tuple[RankingProtocol, ...] = ("full", "popular", "uniform")
NO_SIZES = {"tokenizer", "vocab", *IMAGE_FIELDS}
"""Fields of `new` that do not belong to a recommender."""
SAMPLES, SHOWN = 3, 5
"""Users in the report, and items of each list."""
EVALUATED = 500
"""Most users that the validation while training is measured on."""


def interactions_step(recipe: Recipe) -> Train | None:
    """Return the training step of a recipe on interactions; None for other recipes."""
    step = recipe.steps[0]
    return cast(Train, step) if getattr(step, "interactions", None) is not None else None


def train_recommender(spec: RunSpec, out: Path, *, resume: bool, overwrite: bool, progress: Progress) -> dict[str, Any]:
    """Run a recipe on interactions; see `run.carve`, which calls it.

    Returns:
        The content of `report.json`: `{title, model, data, rankings, curve, samples, ...}`.

    Raises:
        IntaglioError: the log is malformed, has too few interactions, or items that the model does not know.
    """
    recipe, step = spec.recipe, cast(Train, interactions_step(spec.recipe))
    log = load_interactions(str(step.interactions))
    prepared: list[ItemSequences] = []

    def start() -> Checkpoint:
        if recipe.new is not None and spec.from_scratch:
            items = item_sequences(step, log, None)
            sizes = recipe.new.model_dump(exclude=NO_SIZES, exclude_none=True)
            checkpoint = new_recommender(items, **sizes, seed=recipe.seed % 2**32)
            checkpoint.model.to(spec.device, spec.dtype if isinstance(spec.dtype, torch.dtype) else None)
        else:
            checkpoint = load(spec.source_name, device=spec.device, dtype=spec.dtype)
            items = item_sequences(step, log, item_names(checkpoint))
        if titles := _titles(items):
            checkpoint.companions[ITEMS] = atomic_io.to_json(titles).encode()
        prepared.append(items)
        return checkpoint

    def train(checkpoint: Checkpoint, directory: Path) -> None:
        (items,) = prepared
        rows = [{"input_ids": list(ids)} for ids in items.training(step.held_out).values()]
        evaluate = partial(
            _validate, questions=items.validation()[:EVALUATED], error=step.early_stopping_patience is not None
        )
        data = (rows, evaluate if step.held_out > 1 else None)
        step.apply(checkpoint, seed=recipe.seed, directory=directory, resume=resume, progress=progress, data=data)

    def document(checkpoint: Checkpoint) -> dict[str, Any]:
        objective = next(iter(step.objective or {}))
        return recommender_document(checkpoint, prepared[0], spec.source_name, str(step.interactions), objective)

    parts = SingleStep(log.digest, start, train, document, report.recommender_page)
    return run_single_step(spec, out, parts, resume=resume, overwrite=overwrite)


def item_sequences(step: Train, log: Any, names: tuple[str, ...] | None) -> ItemSequences:
    """Return the sequences of a log, of the items of a known recommender if `names` are given."""
    what = f"the log {step.interactions!r}"
    if names is None:
        return ItemSequences.from_interactions(log, step.least, what)
    return ItemSequences.with_vocabulary(log, names, step.least, what)


def _titles(items: ItemSequences) -> dict[str, str]:
    return {name: title for name, title in zip(items.names[1:], items.titles[1:], strict=True) if title}


def _validate(checkpoint: Checkpoint, questions: tuple[Question, ...], error: bool) -> dict[str, float]:
    """Return the validation's NDCG@10 by full ranking, and if wanted `error`, 1 - NDCG@10, to stop early by."""
    quality = ranking_metrics(ranks(checkpoint, questions))["NDCG@10"]
    return {"NDCG@10": quality, **({"error": 1 - quality} if error else {})}


def recommender_document(
    checkpoint: Checkpoint, items: ItemSequences, model: str, source: str, objective: str
) -> dict[str, Any]:
    """Return the report of a trained recommender: rankings of the test items by every protocol, curve, samples."""
    questions, record = items.test(), checkpoint.record.steps[-1]
    arms: dict[str, NextItemModel | Popularity] = {
        objective: NextItemModel.from_checkpoint(checkpoint),
        "popularity": Popularity(items.counts),
    }
    rankings = [
        {"recommender": name, "protocol": protocol, **ranking_metrics(
            ranks(arm, questions, protocol=protocol, counts=items.counts))}
        for protocol in PROTOCOLS for name, arm in arms.items()
    ]  # fmt: skip
    return {
        "format": report.FORMAT,
        "title": f"{objective} trained on {source}",
        "model": model,
        "objective": objective,
        "data": {
            "source": source, "users": len(items.sequences), "items": items.items,
            "interactions": sum(map(len, items.sequences.values())), "digest": items.digest,
        },
        "rankings": rankings,
        "curve": record.chosen["curve"],
        "samples": [_sample(arms[objective], items, question) for question in questions[:SAMPLES]],
        "parameters": record.parameters,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "device": str(checkpoint.device),
        "dtype": str(next(checkpoint.model.parameters()).dtype).removeprefix("torch."),
    }  # fmt: skip


def _sample(predictor: Any, items: ItemSequences, question: Question) -> dict[str, Any]:
    scores_V = predictor.scores([question.history])[0]
    scores_V[list(question.history)] = -torch.inf
    best = scores_V.topk(min(SHOWN, int(torch.isfinite(scores_V).sum()))).indices.tolist()
    shown = {item: items.titles[item] or items.names[item] for item in (*question.history, *best, question.target)}
    return {
        "user": question.user,
        "history": [shown[item] for item in question.history[-SHOWN:]],
        "recommended": [shown[item] for item in best],
        "next": shown[question.target],
    }
