"""What a run measures and calibrates on, and what it measures with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

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
    """The token segments of a run.

    Args:
        calibration: what steps are calibrated on; None if no step needs it.
        held_out: what is measured on. No document is in both.
        texts: the documents that `calibration` is cut from: what fits and training see.
        sealed: hashes of the documents that `held_out` is cut from: nothing is trained on them.
    """

    calibration: Segments | None
    held_out: Segments
    texts: Corpus
    sealed: frozenset[str]


def read_texts(recipe: Recipe) -> tuple[Corpus, Corpus]:
    """What a recipe calibrates on and what it measures on; no document is in both.

    Args:
        recipe: names the texts.

    Raises:
        IntaglioError: missing or empty texts, or too few of them.
    """
    return calibration_and_held_out(load_texts(recipe.calibration.texts), load_texts(recipe.measure.texts))


def prepare_data(recipe: Recipe, checkpoint: Checkpoint, texts: tuple[Corpus, Corpus]) -> Data:
    """Cut calibration and held-out segments.

    Args:
        recipe: how many of which length.
        checkpoint: whose tokenizer and context are used.
        texts: from `read_texts`.

    Raises:
        IntaglioError: no tokenizer, or too few texts.
    """
    calibration, held_out = texts
    needed = any(not isinstance(step, Fit) and cast(Carving, step).needs_calibration for step in recipe.steps)
    return Data(
        held_out=held_out_segments(checkpoint, held_out, recipe.measure),
        calibration=segments(
            checkpoint.tokenizer,
            calibration,
            recipe.calibration.samples,
            min(recipe.calibration.length, checkpoint.context),
            recipe.seed,
        )
        if needed
        else None,
        texts=calibration,
        sealed=frozenset(held_out.hashes),
    )


def held_out_segments(checkpoint: Checkpoint, corpus: Any, wanted: Measure) -> Segments:
    """Segments to measure on: the same for every seed, so that runs can be compared.

    Args:
        checkpoint: whose tokenizer and context are used.
        corpus: held-out documents.
        wanted: samples and length.

    Raises:
        IntaglioError: no tokenizer, or too few texts.
    """
    if checkpoint.tokenizer is None:
        raise IntaglioError(f"{checkpoint.source} has no tokenizer, so no text can be measured")
    return segments(checkpoint.tokenizer, corpus, wanted.samples, min(wanted.length, checkpoint.context), seed=0)


def make_evaluator(
    original: Checkpoint, held_out: Segments, wanted: Measure, progress: Progress = no_progress, repeats: int = REPEATS
) -> Evaluator:
    """What a recipe's `measure` asks for.

    Args:
        original: what agreement is with.
        held_out: what is measured on.
        wanted: batch size, and whether speed is timed.
        progress: called after each batch.
        repeats: counted runs of the timing.
    """
    return Evaluator(
        original, held_out, batch_size=wanted.batch_size, timed=wanted.speed, repeats=repeats, progress=progress
    )
