"""The steps of a recipe: whether they fit a model, and how one is applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from intaglio.checkpoint import Checkpoint
from intaglio.data.text_pairs import TextPair
from intaglio.errors import IntaglioError
from intaglio.masks import predicts_next
from intaglio.methods.base import (
    Carving,
    ChecksData,
    ChecksFits,
    ChecksModel,
    Fittable,
    Progress,
    RemovesBlocks,
    ReplacesTokenizer,
    Resumable,
)
from intaglio.modeling.anatomy import Anatomy
from intaglio.recipe.data import Data
from intaglio.recipe.schema import Fit, Recipe, Step, fitted_methods, method_of
from intaglio.search.encoders import ObjectiveEncoder
from intaglio.search.hard_negatives import mine_hard_negatives
from intaglio.trainer.encoder_training import EncoderObjective
from intaglio.trainer.mining import Mine, Mining


def check_fit(steps: tuple[Step, ...], parts: Anatomy, name: str, tokenizer: Any = None) -> None:
    """Refuse, before any work, a model that a step does not fit, in the state the earlier steps leave it.

    Args:
        steps: of the recipe.
        parts: anatomy of the model.
        name: of the model, for error messages.
        tokenizer: of the model, checked by a step that replaces it. Default None: not checked.

    Raises:
        IntaglioError: names the step and the layer.
    """
    generates, linears_known = predicts_next(parts), True
    for step in steps:
        method = method_of(step)
        if "causal" in method.requires and not generates:
            what = "is an encoder" if not parts.causal else "labels tokens or sees later ones"
            raise IntaglioError(f"{step.slug} needs a model that generates; {name} {what}")
        # A step can restore the causal mask, but not a language-model head.
        generates = generates or ("attention" in method.changes and parts.causal and parts.head is not None)
        if not isinstance(step, Fit):
            if linears_known:
                linears = parts.all_linears(experts=method.edits_experts)
                cast(Carving, step).check([(full, *linear.shape) for full, linear in linears])
            # The projections that a merge restores do not exist yet.
            linears_known = linears_known and "linear_weights" not in method.restores
            if isinstance(step, ChecksModel):
                step.check_model(parts)
            if isinstance(step, RemovesBlocks):
                parts = step.anatomy_after(parts)
        if isinstance(step, ReplacesTokenizer) and tokenizer is not None:
            step.check_tokenizer(tokenizer, name)
            tokenizer = None  # the one that a second such step replaces does not exist yet


def check_uses(steps: tuple[Step, ...], checkpoint: Checkpoint) -> None:
    """Refuse, before any work, steps that use a fit which neither the checkpoint nor an earlier step has."""
    for index, step in enumerate(steps):
        if isinstance(step, RemovesBlocks):
            return  # the blocks that a later fit reads are not known yet
        if isinstance(step, ChecksFits):
            step.check_fits(checkpoint, fitted_methods(steps[:index]))


def check_data(steps: tuple[Step, ...]) -> None:
    """Refuse, before any work, data of a step that cannot be read."""
    for step in steps:
        if isinstance(step, ChecksData):
            step.check_data()


def replaces_tokenizer(*steps: Step) -> bool:
    """Return whether one of the steps replaces the tokenizer."""
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
        step: a method to apply, a fit, or training.
        checkpoint: edited, or attached to.
        recipe: gives seed and batch size.
        data: gives calibration data and texts.
        progress: called after each unit of work.
        directory: for the state of a resumable step. Default: none.
        resume: whether such a step resumes from `directory`. Default False.
        original: loads the checkpoint as it was before the recipe, for selectors that compare.
    """
    options: dict[str, Any] = {"seed": recipe.seed, "progress": progress}
    if is_resumable(step):
        options |= {"directory": directory, "resume": resume}
    if is_training(step):
        options |= {"held_out_hashes": data.sealed, "original": original, "mine": miner}
        cast(Any, step).apply(checkpoint, data.texts, **options)
        return
    options["batch_size"] = recipe.calibration.batch_size
    if isinstance(step, Fit):
        cast(Fittable, step.method).fit(checkpoint, data.texts, **options)
    else:
        cast(Carving, step).apply(checkpoint, data.calibration, **options)


def miner(objective: EncoderObjective, checkpoint: Checkpoint) -> Mine:
    """Return the function that mines hard negatives, by the model before training where the encoder is `self`."""

    def mine(pairs: Sequence[TextPair], mining: Mining) -> list[TextPair]:
        own = ObjectiveEncoder(objective, checkpoint, "self") if mining.encoder == "self" else None
        return mine_hard_negatives(pairs, mining, encoder=own)

    return mine


def is_training(step: Step) -> bool:
    """Return whether it is a `train` step."""
    return step.slug == "train"


def is_resumable(step: Step) -> bool:
    """Return whether a step keeps a state of its own while it runs, and resumes from it."""
    return is_training(step) or isinstance(step, Fit) or (isinstance(step, Resumable) and step.long)
