"""Work of recipes on interactions, labelled texts or images: a pass of the weightless model, counted by operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from intaglio.checkpoint import Checkpoint, load_config, load_tokenizer
from intaglio.checkpoint.loading import load_image_processor
from intaglio.data.interactions import load_interactions
from intaglio.data.labelled_examples import load_labelled_examples
from intaglio.errors import IntaglioError
from intaglio.methods.base import Cost, Workload
from intaglio.methods.objectives.next_item import item_names, new_recommender
from intaglio.recipe.classifier import attaches_image_classifier, check_kind, classes_step
from intaglio.recipe.recommender import EVALUATED, NO_SIZES, PROTOCOLS, interactions_step, item_sequences
from intaglio.recipe.schema import Fit
from intaglio.recipe.source import RunSpec, meta_model
from intaglio.trainer.protocols import HasTrainingCost
from intaglio.trainer.recipe_step import CHARACTERS, Train

EVALUATIONS = 10
"""Evaluations while training, where the step does not say."""
IMAGE_SIDE = 32
"""Default side of a new model's images."""


@dataclass(frozen=True)
class CountedWork:
    """Work of a recipe of one step on data of its own.

    Args:
        model: without weights, on the meta device.
        step: cost of the step.
        measure_flops: operations of the evaluations while it runs and after it. Default 0.
    """

    model: Any
    step: Cost
    measure_flops: float = 0.0


def count_work(spec: RunSpec) -> CountedWork | None:
    """Return the work of a recipe on interactions, labelled texts or images; None for other recipes.

    The data are read, to count them; of the model, only the configuration.
    """
    if (step := interactions_step(spec.recipe)) is not None:
        return _recommender(spec, step)
    if (step := classes_step(spec.recipe)) is not None:
        return _classifier(spec, step)
    return _attached(spec) if attaches_image_classifier(spec) else None


def _recommender(spec: RunSpec, step: Train) -> CountedWork:
    log, new = load_interactions(str(step.interactions)), spec.recipe.new
    if new is not None and spec.from_scratch:
        items = item_sequences(step, log, None)
        with torch.device("meta"):
            model: Any = new_recommender(items, **new.model_dump(exclude=NO_SIZES, exclude_none=True)).model
    else:
        model = meta_model(spec)
        known = Checkpoint(model, load_tokenizer(load_config(spec.source_name)[0]), spec.source_name)
        items = item_sequences(step, log, item_names(known))
    length, width = int(model.config.max_position_embeddings), int(model.config.hidden_size)
    flops, kept = counted_pass(model.base_model, _tokens(model, length))
    fields = next(iter((step.objective or {}).values()))
    scored = 0.0 if fields.get("loss_type") == "bce" else length * fields.get("mask_ratio", 1.0)
    position = 2.0 * width * items.vocabulary  # scores of all items at one position
    cost, steps = _training(step, model, len(items.training(step.held_out)), length, flops + scored * position,
                            kept + 12 * int(scored) * items.vocabulary)  # fmt: skip
    users = len(items.sequences)
    rankings = _evaluations(step, steps) * min(users, EVALUATED) + len(PROTOCOLS) * users
    return CountedWork(model, cost, rankings * (flops + position))


def _classifier(spec: RunSpec, step: Train) -> CountedWork:
    training, validation, _ = step.labelled()
    model: Any = meta_model(spec)
    check_kind(spec, training, model.config)
    length = 1
    if training.kind == "image":
        batch = _pixels(spec)
    else:
        most = int(getattr(step.objective_method(), "length", None) or model.config.max_position_embeddings)
        new = spec.recipe.new if spec.from_scratch else None
        characters = 1 if new is not None and new.tokenizer == "bytes" else CHARACTERS
        lengths = [min(most, 2 + len(row["text"]) // characters) for row in training.rows]
        length = max(2, round(float(np.mean(lengths))))
        batch = _tokens(model, length)
    flops, kept = counted_pass(model.base_model, batch)  # without a head over the vocabulary
    cost, steps = _training(step, model, len(training), length, flops, kept)
    held_out = 0 if validation is None else len(validation)
    return CountedWork(model, cost, held_out * (1 + _evaluations(step, steps)) * flops)


def _attached(spec: RunSpec) -> CountedWork:
    method: Any = cast(Fit, spec.recipe.steps[0]).method
    if method.labels is None:
        raise IntaglioError(f"labels is missing; {method.slug} needs a folder with a folder of images for each class")
    images, model = load_labelled_examples(method.labels), meta_model(spec)
    flops, kept = counted_pass(model, _pixels(spec))
    return CountedWork(model, Cost(len(images) * flops, extra_bytes=spec.recipe.calibration.batch_size * kept))


def _tokens(model: Any, length: int) -> dict[str, Tensor]:
    """Return embedded tokens; of ids, some models look at the values."""
    return {"inputs_embeds": torch.zeros(1, length, model.get_input_embeddings().embedding_dim, device="meta")}


def _pixels(spec: RunSpec) -> dict[str, Tensor]:
    """Return an image as the model takes it."""
    new = spec.recipe.new
    if new is not None and spec.from_scratch:
        side = new.image_size or IMAGE_SIDE
        return {"pixel_values": torch.zeros(1, new.num_channels or 3, side, side, device="meta")}
    source, config = load_config(spec.source_name)
    blank = np.zeros((IMAGE_SIDE, IMAGE_SIDE, int(getattr(config, "num_channels", 3))), dtype=np.uint8)
    pixels = load_image_processor(source)(blank, return_tensors="pt", input_data_format="channels_last")
    return {"pixel_values": pixels["pixel_values"].to("meta")}


@torch.no_grad()
def counted_pass(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[float, int]:
    """Return the operations of a pass, and the bytes of the activations that a backward pass would need."""
    kept = 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal kept
        kept += output.numel() * 4 if isinstance(output, Tensor) else 0

    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [module.register_forward_hook(count) for module in leaves]
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.device("meta"):
            model.eval()(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return float(counter.get_total_flops()), kept


def _training(step: Train, model: nn.Module, examples: int, length: int, flops: float, kept: int) -> tuple[Cost, float]:
    """Return the cost of training on passes of one example, and the number of steps.

    A backward pass costs two forward passes, one where the weights are frozen. Memory: two moments and the gradient of
    the trained weights, and the activations of a batch.
    """
    seen = step.epochs * examples if step.epochs is not None else (step.steps or 0) * step.step_rows
    seen = step.tokens / length if step.tokens is not None else seen
    steps, frozen = seen / step.step_rows, step.lora is not None or step.freeze
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    shapes = tuple((linear.out_features, linear.in_features) for linear in linears)
    parameters = sum(p.numel() for p in model.parameters())
    trained = 0 if frozen else parameters
    if step.lora is not None:
        trained = sum(step.lora.r * (rows + columns) for rows, columns in shapes)
    width = int(getattr(model.config, "hidden_size", 0) or shapes[-1][0] if shapes else 0)
    workload = Workload(shapes, parameters, parameters, width, 0, 0, next(model.parameters()).element_size())
    passes = (2 if frozen else 3) + step.gradient_checkpointing
    dearer = [part for part in step.parts if isinstance(part, HasTrainingCost)]
    batch = step.batch_size
    own = [part.training_cost(workload, steps, batch * length, passes * flops * step.step_rows) for part in dearer]
    cost = Cost(
        flops=passes * flops * seen + sum(part.flops for part in own),
        sorted_elements=sum(part.sorted_elements for part in own),
        extra_bytes=12 * trained + batch * kept + sum(part.extra_bytes for part in own),
    )
    return cost, steps


def _evaluations(step: Train, steps: float) -> int:
    return EVALUATIONS if step.evaluate_every is None else int(steps // step.evaluate_every)
