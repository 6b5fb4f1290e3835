"""The steps of a recipe: whether they fit a model, and one of them applied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.masks import predicts_next
from intaglio.methods.base import Carving, ChecksModel, Fittable, Progress, RemovesBlocks, ReplacesTokenizer, Resumable
from intaglio.modeling.anatomy import Anatomy
from intaglio.recipe.data import Data
from intaglio.recipe.schema import Fit, Recipe, Step, method_of


def check_fit(steps: tuple[Step, ...], parts: Anatomy, name: str, tokenizer: Any = None) -> None:
    """Refuse, before any work, a model that a step does not fit, as the steps before it will have left it.

    Args:
        steps: of the recipe.
        parts: of the model.
        name: of the model, for the sentence.
        tokenizer: of the model, for a step that replaces it. Default None: that is not looked at.

    Raises:
        IntaglioError: names the step and the layer.
    """
    able, known = predicts_next(parts), True  # a merge gives projections that are not there yet
    for step in steps:
        if "causal" in method_of(step).requires and not able:
            what = "is an encoder" if not parts.causal else "labels tokens or sees later ones"
            raise IntaglioError(f"{step.slug} needs a model that generates; {name} {what}")
        # A rule may be taken back by a step; a head is not.
        able = able or ("attention" in method_of(step).changes and parts.causal and parts.head is not None)
        if not isinstance(step, Fit):
            if known:
                cast(Carving, step).check([(full, *linear.shape) for full, linear in parts.all_linears()])
            known = known and "linear_weights" not in method_of(step).restores
            if isinstance(step, ChecksModel):
                step.check_model(parts)
            if isinstance(step, RemovesBlocks):
                parts = step.anatomy_after(parts)
        if isinstance(step, ReplacesTokenizer) and tokenizer is not None:
            step.check_tokenizer(tokenizer, name)
            tokenizer = None  # what a second such step finds is not there yet


def retokenizes(steps: tuple[Step, ...]) -> bool:
    """Whether one of the steps gives the checkpoint another tokenizer.

    Args:
        steps: of a recipe.
    """
    return any(isinstance(step, ReplacesTokenizer) for step in steps)


def apply_step(
    step: Step,
    checkpoint: Checkpoint,
    recipe: Recipe,
    data: Data,
    progress: Progress,
    directory: Path | None = None,
    resume: bool = False,
    original: Callable[[], Checkpoint] | None = None,
) -> None:
    """Apply one step of a recipe in place.

    Args:
        step: a carving, a fit, or training.
        checkpoint: edited, or attached to.
        recipe: for seed and batch size.
        data: for calibration.
        progress: called as it goes on.
        directory: where training keeps what it needs to go on after it was killed. Default: nowhere.
        resume: whether training goes on with what is there. Default False.
        original: loads the checkpoint as it was before the recipe, for selectors that compare.
    """
    if trains(step):
        cast(Any, step).apply(
            checkpoint,
            data.texts,
            seed=recipe.seed,
            held_out_hashes=data.sealed,
            original=original,
            directory=directory,
            resume=resume,
            progress=progress,
        )
        return
    options: dict[str, Any] = {
        "seed": recipe.seed, "batch_size": recipe.calibration.batch_size, "progress": progress
    }  # fmt: skip
    if goes_on(step):
        options |= {"directory": directory, "resume": resume}
    if isinstance(step, Fit):
        cast(Fittable, step.method).fit(checkpoint, data.texts, **options)
    else:
        cast(Carving, step).apply(checkpoint, data.calibration, **options)


def trains(step: Step) -> bool:
    """Whether it is a training step.

    Args:
        step: of a recipe.
    """
    return step.slug == "train"


def goes_on(step: Step) -> bool:
    """Whether a step keeps a state of its own while it runs, and goes on with that.

    Args:
        step: of a recipe.
    """
    return trains(step) or isinstance(step, Fit) or (isinstance(step, Resumable) and step.long)
