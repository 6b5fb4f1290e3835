"""The report document of a run, beside its measurements."""

from __future__ import annotations

from typing import Any

import torch
import yaml

from intaglio import report
from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.environment import versions
from intaglio.methods.base import Method, ReplacesTokenizer, accepted_fields
from intaglio.methods.registry import METHODS, get_method
from intaglio.recipe.data import Data
from intaglio.recipe.schema import Fit, Measure, Recipe, Step, method_of
from intaglio.recipe.steps import is_training


def non_default_fields(method: Method) -> dict[str, Any]:
    """Return the non-default fields of a method, recursively; a nested method with none is listed whole."""
    fields = method.model_dump(include=set(accepted_fields(type(method))), exclude_defaults=True)
    return {name: _non_default(value) or method.model_dump(include={name})[name] for name, value in fields.items()}


def _non_default(value: Any) -> Any:
    """Reduce `{slug: fields}`, or a list of such, to the non-default fields; return other values unchanged."""
    if isinstance(value, list):
        return [_non_default(item) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        slug, fields = next(iter(value.items()))
        if slug in METHODS and isinstance(fields, dict):
            return {slug: non_default_fields(get_method(slug)(**fields))}
    return value


def steps_title(steps: tuple[Step, ...]) -> str:
    """Return the steps in a few words: `carved by wanda, dsnot; fitted aded`."""
    fitted = ", ".join(step.slug for step in steps if isinstance(step, Fit))
    carved = ", ".join(step.slug for step in steps if not isinstance(step, Fit) and not is_training(step))
    parts = {f"carved by {carved}": carved, "trained": any(map(is_training, steps)), f"fitted {fitted}": fitted}
    return "; ".join(part for part, present in parts.items() if present)


def environment(checkpoint: Checkpoint, measure: Measure, held_out: Segments) -> dict[str, Any]:
    """Return the conditions of the measurements: held-out data, library versions, threads, device and dtype."""
    return {
        "measure": {
            "texts": measure.texts, "samples": held_out.n, "length": held_out.length, "digest": held_out.digest
        },
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "device": str(checkpoint.device),
        "dtype": str(next(checkpoint.model.parameters()).dtype).removeprefix("torch."),
    }  # fmt: skip


def new_tokens_note(steps: tuple[Step, ...], before: Any, checkpoint: Checkpoint, held_out: Segments) -> list[str]:
    """Return a note on the share of held-out tokens that the replaced tokenizer did not have, if one was replaced.

    Args:
        steps: of the recipe.
        before: the tokenizer before the steps.
        checkpoint: the result.
        held_out: the held-out text in the tokens of the result.
    """
    step = next((step for step in reversed(steps) if isinstance(step, ReplacesTokenizer)), None)
    if step is None:
        return []
    new = step.new_tokens(before, checkpoint.tokenizer)
    share = float(torch.isin(held_out.ids_NT, torch.tensor(sorted(new), dtype=torch.int64)).float().mean())
    return [
        f"The tokenizer was replaced: after {step.slug}, {share:.1%} of the held-out tokens are new to the model. "
        "Perplexity is per token, so compare bits per byte."
    ]


def make_document(
    recipe: Recipe,
    checkpoint: Checkpoint,
    name: str,
    data: Data,
    before: dict[str, Any],
    after: dict[str, Any],
    seconds: list[float | None],
) -> dict[str, Any]:
    """Return the content of `report.json`, without the digest, time and notes of the whole run.

    Args:
        recipe: the recipe.
        checkpoint: the result.
        name: of the source.
        data: calibration and held-out data.
        before: measurements before the steps.
        after: measurements after the steps.
        seconds: duration of each step; None for a step of an interrupted run.
    """
    records = checkpoint.record.steps[-len(recipe.steps) :]
    return {
        "format": report.FORMAT,
        "title": f"{name} {steps_title(recipe.steps)}",
        "model": name,
        "kind": checkpoint.kind,
        "steps": [
            _with_charts(record.model_dump())
            | {"given": non_default_fields(method_of(step)), "seconds": duration}
            | ({"timings": record.timings} if record.timings else {})
            for record, step, duration in zip(records, recipe.steps, seconds, strict=True)
        ],
        "before": before,
        "after": after,
        **environment(checkpoint, recipe.measure, data.held_out),
        "recipe": yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True),
    }


def _with_charts(step: dict[str, Any]) -> dict[str, Any]:
    """Move the charts and samples of a step (see `report.document`) out of its chosen values."""
    charts = {name: step["chosen"].pop(name) for name in ("curve", "bars", "grid", "samples") if name in step["chosen"]}
    return step | charts
