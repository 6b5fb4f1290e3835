"""What a checkpoint's record says was done to it, held against the steps of a recipe before any weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from intaglio.checkpoint import Record, StepRecord, load_record
from intaglio.methods.base import Method, RecordedStep, check_order
from intaglio.methods.registry import METHODS, PUBLISHED, get_method
from intaglio.recipe.schema import Recipe
from intaglio.recipe.source import is_new, name_of


def check_earlier(recipe: Recipe, model: str | None) -> None:
    """Refuse steps that need what an earlier run has undone.

    Args:
        recipe: what would be done.
        model: the one on the command line, which wins over the recipe's.

    Raises:
        IntaglioError: names both steps and the fact; or there is no such model.
    """
    if is_new(recipe, model):
        return
    record = load_record(name_of(recipe, model))
    if record is not None:
        check_order(recipe.steps, applied(record))


def applied(record: Record) -> list[RecordedStep]:
    """The steps of a record that edited the checkpoint, with what they changed, took and gave back.

    A live step counts only while something of the record is live. Of what this version does not know nothing is said.

    Args:
        record: of a checkpoint.
    """
    done = [_applied(step, bool(record.live)) for step in record.steps if step.verb == "carve"]
    return [one for one in done if one is not None]


def _applied(step: StepRecord, live: bool) -> RecordedStep | None:
    if step.slug == "train":
        return _trained(step.parameters)
    method = _known(step.slug, step.parameters)
    if method is None or (getattr(method, "storage", "standalone") == "runtime" and not live):
        return None
    return RecordedStep(step.slug, method.changes, method.invalidates, method.restores)


def _trained(parameters: Mapping[str, Any]) -> RecordedStep:
    """A training, whose record names its parts as `train` was given them, which may be objects without a slug."""
    named = [
        parameters.get("objective"),
        parameters.get("select"),
        *(parameters.get("modifiers", parameters.get("shape")) or ()),
    ]
    found = [_known(slug, fields) for one in named if isinstance(one, Mapping) for slug, fields in one.items()]
    parts = [part for part in found if part is not None]
    own = RecordedStep(
        "train", frozenset({"weights"}), frozenset(() if parameters.get("keep_mask", True) else {"zeros"})
    )
    return RecordedStep(
        own.slug,
        own.changes.union(*(part.changes for part in parts)),
        own.invalidates.union(*(part.invalidates for part in parts)),
    )


def _known(slug: str, fields: Any) -> Method | None:
    """The method with the fields of a record; None where this version has none such."""
    if slug not in PUBLISHED and slug not in METHODS:
        return None
    try:
        return get_method(slug).model_validate(fields)
    except ValidationError:  # of another version, whose fields had other names
        return None
