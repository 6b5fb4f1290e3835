"""What a report says of a run beside the numbers."""

from __future__ import annotations

from typing import Any

import torch
import yaml

from intaglio import report
from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.environment import versions
from intaglio.methods.base import Method, ReplacesTokenizer, accepted_fields
from intaglio.methods.registry import PUBLISHED, get_method
from intaglio.recipe.data import Data
from intaglio.recipe.schema import Fit, Measure, Recipe, Step, method_of
from intaglio.recipe.steps import trains


def given(method: Method) -> dict[str, Any]:
    """The fields of a method that are not as they are by default, and of the methods in it as well.

    Args:
        method: of a step.
    """
    left = method.model_dump(include=set(accepted_fields(type(method))), exclude_defaults=True)
    # A part that was given with all its defaults is told whole.
    return {name: _given(value) or method.model_dump(include={name})[name] for name, value in left.items()}


def _given(value: Any) -> Any:
    """The same of what a field holds: `{slug: fields}`, a list of such, or anything else, which stays."""
    if isinstance(value, list):
        return [_given(item) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        slug, fields = next(iter(value.items()))
        if slug in PUBLISHED and isinstance(fields, dict):
            return {slug: given(get_method(slug)(**fields))}
    return value


def what_was_done(steps: tuple[Step, ...]) -> str:
    """The steps in a few words: `carved by wanda, dsnot; fitted aded`.

    Args:
        steps: of the recipe.
    """
    fitted = ", ".join(step.slug for step in steps if isinstance(step, Fit))
    carved = ", ".join(step.slug for step in steps if not isinstance(step, Fit) and not trains(step))
    trained = any(map(trains, steps))
    return "; ".join(
        [f"carved by {carved}"] * bool(carved) + ["trained"] * trained + [f"fitted {fitted}"] * bool(fitted)
    )


def provenance(checkpoint: Checkpoint, wanted: Measure, held_out: Segments) -> dict[str, Any]:
    """What every report says about how it was measured.

    Args:
        checkpoint: gives device and dtype.
        wanted: what was asked for.
        held_out: what was measured on.
    """
    return {
        "measure": {"texts": wanted.texts, "samples": held_out.n, "length": held_out.length, "digest": held_out.digest},
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "device": str(checkpoint.device),
        "dtype": str(next(checkpoint.model.parameters()).dtype).removeprefix("torch."),
    }


def new_tokens_note(steps: tuple[Step, ...], before: Any, checkpoint: Checkpoint, held_out: Segments) -> list[str]:
    """How much of the held-out text is written with tokens that the model did not have before; nothing if it had all.

    Args:
        steps: of the recipe.
        before: its tokenizer then.
        checkpoint: what came out.
        held_out: the text in its tokens.
    """
    step = next((step for step in reversed(steps) if isinstance(step, ReplacesTokenizer)), None)
    if step is None:
        return []
    new = step.new_tokens(before, checkpoint.tokenizer)
    share = float(torch.isin(held_out.ids_NT, torch.tensor(sorted(new), dtype=torch.int64)).float().mean())
    return [
        f"The tokenizer was replaced: {share:.1%} of the held-out tokens behind {step.slug} are ones that the model "
        "did not have before. Perplexity is a token's, so compare bits per byte."
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
    """What `report.json` holds, but for the times of the whole run.

    Args:
        recipe: what was run.
        checkpoint: what came out.
        name: what it was made from.
        data: what it was made and measured with.
        before: the measurements before the steps.
        after: those behind them.
        seconds: that each step took; None for one of an earlier run.
    """
    made = checkpoint.record.steps[-len(recipe.steps) :]
    return {
        "format": report.FORMAT,
        "title": f"{name} {what_was_done(recipe.steps)}",
        "model": name,
        "kind": checkpoint.kind,
        "steps": [
            _with_pictures(record.model_dump())
            | {"given": given(method_of(step)), "seconds": took}
            | ({"timings": record.timings} if record.timings else {})
            for record, step, took in zip(made, recipe.steps, seconds, strict=True)
        ],
        "before": before,
        "after": after,
        **provenance(checkpoint, recipe.measure, data.held_out),
        "recipe": yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True),
    }


def _with_pictures(step: dict[str, Any]) -> dict[str, Any]:
    """A step's record with what is drawn of it beside what it chose rather than in it.

    That is `curve`, training curves (see `intaglio.report.training_curves`), `bars` and `grid` (see `report.document`).
    """
    drawn = {name: step["chosen"].pop(name) for name in ("curve", "bars", "grid") if name in step["chosen"]}
    return step | drawn
