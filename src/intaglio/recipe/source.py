"""What the steps of a recipe begin with: a checkpoint that is loaded, or a model from scratch."""

from __future__ import annotations

from typing import Any

import torch

from intaglio.checkpoint import Checkpoint, load, load_config, model_class, parse_device, parse_dtype
from intaglio.checkpoint.from_scratch import TRAINED, new
from intaglio.data.texts import Corpus
from intaglio.errors import IntaglioError
from intaglio.recipe.schema import Recipe


def is_new(recipe: Recipe, model: str | None) -> bool:
    """Whether the recipe makes its model itself.

    Args:
        recipe: what is run.
        model: the one on the command line, which wins.
    """
    return model is None and recipe.new is not None


def name_of(recipe: Recipe, model: str | None) -> str:
    """What is carved, in words: the model on the command line, or else the recipe's."""
    name = recipe.model if model is None else model
    if name is None and recipe.new is not None:
        return f"new {recipe.new.family}"
    if name is None:
        raise IntaglioError("no model is given: name one on the command line or in the recipe")
    return name


def begin(recipe: Recipe, texts: Corpus, model: str | None, device: str | None, dtype: str | None) -> Checkpoint:
    """What the steps begin with: a checkpoint that is loaded, or a model from scratch."""
    if recipe.new is None or model is not None:
        return load(name_of(recipe, model), device=device, dtype=dtype)
    fields = recipe.new.model_dump()
    if recipe.new.tokenizer == "texts":  # of those that are calibrated on alone
        fields["tokenizer"] = texts
    made = new(**fields, seed=recipe.seed % 2**32)
    kind = parse_dtype(dtype)
    made.model.to(parse_device(device), kind if isinstance(kind, torch.dtype) else None)
    return made


def skeleton(recipe: Recipe, model: str | None) -> Any:
    """The model without its weights."""
    with torch.device("meta"):
        if recipe.new is None or model is not None:
            name = name_of(recipe, model)
            _, config = load_config(name)
            return model_class(config, name)(config)
        fields = recipe.new.model_dump() | {"tokenizer": "bytes"}
        if recipe.new.tokenizer == "texts":
            fields["vocab"] = recipe.new.vocab or TRAINED
        return new(**fields).model


def blind_guess(checkpoint: Checkpoint, side: dict[str, Any]) -> list[str]:
    """A note on a model that knows less of the text than nothing, which no trained model with its own tokenizer does.

    Args:
        checkpoint: what was measured, before anything was done to it.
        side: its measurements.
    """
    perplexity, rows = side["perplexity"], checkpoint.vocabulary
    if perplexity is None or perplexity <= rows:
        return []
    return [
        f"Before anything was done the model predicted the held-out text worse than a blind guess among its {rows:,} "
        f"tokens would (perplexity {perplexity:,.0f}): it is not trained, or its tokenizer is another model's."
    ]
