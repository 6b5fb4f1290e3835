"""Calibration and held-out data of a run, and its evaluator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments, segments
from intaglio.data.texts import Corpus, calibration_and_held_out, load_texts
from intaglio.errors import IntaglioError
from intaglio.measures.evaluate import Evaluator
from intaglio.measures.speed import REPEATS
from intaglio.methods.base import Carving, Progress, no_progress
from intaglio.recipe.schema import Fit, Measure, Recipe


@dataclass(frozen=True)
class Data:
    """The token segments of a run; no document is in both `calibration` and `held_out`.

    Args:
        calibration: calibration segments; None if no step needs any.
        held_out: segments for the measurements.
        texts: the calibration documents, which fits and training see.
        sealed: hashes of the held-out documents; nothing is trained on them.
    """

    calibration: Segments | None
    held_out: Segments
    texts: Corpus
    sealed: frozenset[str]


def read_texts(recipe: Recipe) -> tuple[Corpus, Corpus]:
    """Return the calibration and the held-out documents of a recipe, which share none.

    Raises:
        IntaglioError: texts are missing, empty or too few.
    """
    return calibration_and_held_out(load_texts(recipe.calibration.texts), load_texts(recipe.measure.texts))


def prepare_data(recipe: Recipe, checkpoint: Checkpoint, texts: tuple[Corpus, Corpus]) -> Data:
    """Cut the documents from `read_texts` into segments with the checkpoint's tokenizer.

    Raises:
        IntaglioError: no tokenizer, or too few texts.
    """
    calibration, held_out = texts
    sizes = recipe.calibration
    needed = any(not isinstance(step, Fit) and cast(Carving, step).needs_calibration for step in recipe.steps)
    return Data(
        held_out=held_out_segments(checkpoint, held_out, recipe.measure),
        calibration=segments(
            checkpoint.tokenizer, calibration, sizes.samples, min(sizes.length, checkpoint.context), recipe.seed
        )
        if needed
        else None,
        texts=calibration,
        sealed=frozenset(held_out.hashes),
    )


def held_out_segments(checkpoint: Checkpoint, corpus: Corpus, measure: Measure) -> Segments:
    """Cut held-out documents into segments: the same for every seed, so that runs can be compared.

    Raises:
        IntaglioError: no tokenizer, or too few texts.
    """
    if checkpoint.tokenizer is None:
        raise IntaglioError(f"{checkpoint.source} has no tokenizer, so no text can be measured")
    return segments(checkpoint.tokenizer, corpus, measure.samples, min(measure.length, checkpoint.context), seed=0)


def make_evaluator(
    original: Checkpoint, held_out: Segments, measure: Measure, progress: Progress = no_progress, repeats: int = REPEATS
) -> Evaluator:
    """Return the evaluator of a recipe's `measure`.

    Args:
        original: checkpoint with which agreement is measured.
        held_out: segments for the measurements.
        measure: batch size, and whether speed is timed.
        progress: called after each batch.
        repeats: counted repeats of each timing.
    """
    return Evaluator(
        original,
        held_out,
        batch_size=measure.batch_size,
        timed=measure.speed,
        repeats=repeats,
        continuations=measure.continuations,
        progress=progress,
    )
