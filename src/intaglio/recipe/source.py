"""The source of a run: which checkpoint a recipe starts from, on which device and in which dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch

from intaglio.checkpoint import Checkpoint, load, load_config, model_class, parse_device, parse_dtype
from intaglio.checkpoint.from_scratch import TRAINED, new, new_image_model
from intaglio.data.texts import Corpus
from intaglio.errors import IntaglioError
from intaglio.recipe.schema import New, Recipe

IMAGE_FIELDS = ("image_size", "num_channels")
"""Fields of `new` that belong to models of images."""


@dataclass(frozen=True)
class RunSpec:
    """A validated recipe run: the recipe, with its seed, and what the command line adds to it.

    Args:
        recipe: the steps and the settings that they share.
        model: source named on the command line; None: the recipe's.
        device: device of the model.
        dtype: dtype of the weights; `auto`: the checkpoint's own.
    """

    recipe: Recipe
    model: str | None
    device: torch.device
    dtype: torch.dtype | Literal["auto"]

    @classmethod
    def from_args(
        cls,
        recipe: Recipe,
        model: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        seed: int | None = None,
    ) -> Self:
        """Validate the arguments of a run.

        Args:
            recipe: the recipe.
            model: a bundled name, a directory or a hub id; overrides the recipe's.
            device: name of a device. Default: the CPU.
            dtype: name of a dtype. Default: the checkpoint's own.
            seed: overrides the recipe's.

        Raises:
            IntaglioError: no model is given, or an unknown device, dtype or seed.
        """
        if model is None and recipe.model is None and recipe.new is None:
            raise IntaglioError("no model is given: name one on the command line or in the recipe")
        return cls(recipe.with_seed(seed), model, parse_device(device), parse_dtype(dtype))

    @property
    def from_scratch(self) -> bool:
        """Whether the recipe makes a new model."""
        return self.model is None and self.recipe.new is not None

    @property
    def source_name(self) -> str:
        """Name of the source, for the report and error messages."""
        if self.model is None and self.recipe.new is not None:
            return f"new {self.recipe.new.family}"
        return str(self.recipe.model if self.model is None else self.model)

    def identity(self) -> list[str]:
        """Return source, device and dtype as text, for the digest of a run."""
        return [self.source_name, str(self.device), str(self.dtype)]


def load_source(spec: RunSpec, texts: Corpus) -> Checkpoint:
    """Load the source, or make a new model; `texts` train its tokenizer where the recipe has `tokenizer: texts`."""
    if spec.recipe.new is None or not spec.from_scratch:
        return load(spec.source_name, device=spec.device, dtype=spec.dtype)
    fields, seed = spec.recipe.new.model_dump(exclude={"dropout", *IMAGE_FIELDS}), spec.recipe.seed % 2**32
    if spec.recipe.new.of_images:
        checkpoint = new_image_model(**_image_sizes(spec.recipe.new), seed=seed)
    else:
        if spec.recipe.new.tokenizer == "texts":
            fields["tokenizer"] = texts
        checkpoint = new(**fields, seed=seed)
    checkpoint.model.to(spec.device, spec.dtype if isinstance(spec.dtype, torch.dtype) else None)
    return checkpoint


def _image_sizes(fields: New) -> dict[str, Any]:
    return fields.model_dump(include={"family", "width", "depth", "heads", *IMAGE_FIELDS}, exclude_none=True)


def meta_model(spec: RunSpec) -> Any:
    """Return the source's model on the meta device, without weights."""
    with torch.device("meta"):
        if spec.recipe.new is None or not spec.from_scratch:
            _, config = load_config(spec.source_name)
            return model_class(config, spec.source_name)(config)
        if spec.recipe.new.of_images:
            return new_image_model(**_image_sizes(spec.recipe.new)).model
        fields = spec.recipe.new.model_dump(exclude={"dropout", *IMAGE_FIELDS}) | {"tokenizer": "bytes"}
        if spec.recipe.new.tokenizer == "texts":
            fields["vocab"] = spec.recipe.new.vocab or TRAINED
        return new(**fields).model


def warn_if_worse_than_uniform(checkpoint: Checkpoint, measured: dict[str, Any]) -> list[str]:
    """Return a note if the source's perplexity exceeds that of a uniform guess; no trained model's does."""
    perplexity, vocabulary = measured["perplexity"], checkpoint.vocabulary
    if perplexity is None or perplexity <= vocabulary:
        return []
    return [
        f"Before the first step the model predicted the held-out text worse than a uniform guess among its "
        f"{vocabulary:,} tokens (perplexity {perplexity:,.0f}): it is untrained, or its tokenizer belongs to another "
        "model."
    ]
