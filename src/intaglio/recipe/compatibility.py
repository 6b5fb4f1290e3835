"""Compatibility of a recipe's steps with the recorded history of the checkpoint they start from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from intaglio.checkpoint import Record, StepRecord, load_record
from intaglio.methods.base import Capability, Method, ModelAspect, RecordedStep, check_order
from intaglio.methods.registry import METHODS, get_method
from intaglio.recipe.schema import fitted_methods, method_of
from intaglio.recipe.source import RunSpec


def check_history(spec: RunSpec) -> None:
    """Refuse steps that require a property which a recorded step of the source has invalidated.

    Raises:
        IntaglioError: names both steps and the property; or there is no such model.
    """
    record = None if spec.from_scratch else load_record(spec.source_name)
    if record is not None:
        steps = spec.recipe.steps
        check_order(map(method_of, steps), recorded_steps(record), fitted_methods(steps))


def recorded_steps(record: Record) -> list[RecordedStep]:
    """Return the steps of a record that edited the checkpoint.

    A runtime step counts only while the record has runtime parts. Steps unknown to this version are skipped.
    """
    steps = [_recorded(step, bool(record.live)) for step in record.steps if step.verb == "carve"]
    return [step for step in steps if step is not None]


def _recorded(step: StepRecord, runtime: bool) -> RecordedStep | None:
    if step.slug == "train":
        return _training(step.parameters)
    method = _method(step.slug, step.parameters)
    if method is None or (getattr(method, "storage", "standalone") == "runtime" and not runtime):
        return None
    return RecordedStep(step.slug, method.changes, method.invalidates, method.restores)


def _training(parameters: Mapping[str, Any]) -> RecordedStep:
    """Return a recorded `train` step, whose parts may be Python objects without a slug."""
    modifiers = parameters.get("modifiers") or parameters.get("shape") or ()
    named = [parameters.get("objective"), parameters.get("select"), *modifiers]
    methods = [_method(slug, fields) for part in named if isinstance(part, Mapping) for slug, fields in part.items()]
    parts = [method for method in methods if method is not None]
    weights: frozenset[ModelAspect] = frozenset({"weights"})
    lost: frozenset[Capability] = frozenset(() if parameters.get("keep_mask", True) else {"zeros"})
    return RecordedStep(
        "train",
        weights.union(*(part.changes for part in parts)),
        lost.union(*(part.invalidates for part in parts)),
    )


def _method(slug: str, fields: Any) -> Method | None:
    """Return the method with recorded fields, or None where this version has no such method or fields."""
    if slug not in METHODS:
        return None
    try:
        return get_method(slug).model_validate(fields)
    except ValidationError:
        return None
