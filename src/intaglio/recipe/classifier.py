"""Recipes on labelled texts or images: train a classifier and score it on held-out examples, or fit one to images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from intaglio import report
from intaglio.checkpoint import Checkpoint, load_config
from intaglio.data.labelled_examples import LabelledExamples, check_labels, load_labelled_examples
from intaglio.data.labelled_images import thumbnail
from intaglio.data.texts import Corpus
from intaglio.environment import versions
from intaglio.errors import IntaglioError
from intaglio.measures.token_classification import f1_scores
from intaglio.methods.base import Fittable, Progress
from intaglio.modeling.classifier import is_image_model, is_whole_input_classifier
from intaglio.modeling.token_classifier import label_names
from intaglio.recipe.schema import Calibration, Fit, Measure, Recipe
from intaglio.recipe.single_step import SingleStep, run_single_step
from intaglio.recipe.source import RunSpec, load_source
from intaglio.trainer.classification import Classification, make_evaluator, predict
from intaglio.trainer.recipe_step import Train

MISTAKES = 12
"""Most confident mistakes in the report."""


def classes_step(recipe: Recipe) -> Train | None:
    """Return the training step of a recipe on labelled texts or images; None for other recipes."""
    step = recipe.steps[0]
    return cast(Train, step) if getattr(step, "classes", None) is not None else None


def train_classifier(spec: RunSpec, out: Path, *, resume: bool, overwrite: bool, progress: Progress) -> dict[str, Any]:
    """Run a recipe on labelled texts or images; see `run.carve`, which calls it.

    Returns:
        The content of `report.json`: `{title, model, data, scores, classes, curve, modifiers, mistakes, ...}`.

    Raises:
        IntaglioError: the data are malformed or do not suit the model, or the validation split is the training split.
    """
    step = cast(Train, classes_step(spec.recipe))
    training, validation, shared = step.labelled()
    length = cast(Classification, step.objective_method()).length
    sizes: dict[str, Any] = {"batch_size": step.batch_size, "length": length}
    evaluate = None if validation is None else make_evaluator(validation.rows, **sizes)

    def start() -> Checkpoint:
        texts = tuple(row["text"] for row in training.rows) if training.kind == "text" else ()
        checkpoint = load_source(spec, Corpus(training.name, texts))
        check_kind(spec, training, checkpoint.config)
        if validation is not None:
            goal = cast(Classification, step.objective_method())
            known = label_names(checkpoint.model) if is_whole_input_classifier(checkpoint.model) else training.classes
            check_labels(validation, [name for name in goal.labels or known if name != goal.unlabelled])
        return checkpoint

    def train(checkpoint: Checkpoint, directory: Path) -> None:
        step.apply(
            checkpoint,
            seed=spec.recipe.seed,
            original=start,
            directory=directory,
            resume=resume,
            progress=progress,
            data=(list(training.rows), evaluate),
        )

    def document(checkpoint: Checkpoint) -> dict[str, Any]:
        return classifier_document(checkpoint, spec.source_name, training, validation, shared, length)

    digest = training.digest + ("" if validation is None else validation.digest)
    parts = SingleStep(digest, start, train, document, report.classifier_page)
    return run_single_step(spec, out, parts, resume=resume, overwrite=overwrite)


def check_kind(spec: RunSpec, training: LabelledExamples, config: Any) -> None:
    """Refuse texts for a model of images, and images for one of texts."""
    takes = "image" if is_image_model(config) else "text"
    if takes != training.kind:
        raise IntaglioError(f"{spec.source_name} takes {takes}s; {training.name} holds {training.kind}s")


def attaches_image_classifier(spec: RunSpec) -> bool:
    """Return whether a recipe attaches a classifier to a model of images."""
    step = spec.recipe.steps[0]
    classifier = isinstance(step, Fit) and "classifier" in step.method.kinds
    return classifier and not spec.from_scratch and is_image_model(load_config(spec.source_name)[1])


def attach_classifier(spec: RunSpec, out: Path, *, resume: bool, overwrite: bool, progress: Progress) -> dict[str, Any]:
    """Fit a classifier to labelled images of a frozen model; see `run.carve`, which calls it.

    Returns:
        The content of `report.json`, as for a trained classifier that is not scored.

    Raises:
        IntaglioError: the recipe has further steps or texts, or the data are malformed or do not suit the model.
    """
    recipe, name = spec.recipe, spec.source_name
    method: Any = cast(Fit, recipe.steps[0]).method
    if len(recipe.steps) > 1:
        raise IntaglioError(f"a recipe on {name}, a model of images, has one step; put other steps into another recipe")
    if (recipe.calibration, recipe.measure) != (Calibration(), Measure()) or method.key_texts == "recipe":
        raise IntaglioError(f"{name} is a model of images; calibration, measure and key_texts: recipe are for texts")
    if method.labels is None:
        raise IntaglioError(f"labels is missing; {method.slug} needs a folder with a folder of images for each class")
    training = load_labelled_examples(method.labels)

    def start() -> Checkpoint:
        return load_source(spec, Corpus(training.name, ()))

    def fit(checkpoint: Checkpoint, directory: Path) -> None:
        options: dict[str, Any] = {"seed": recipe.seed, "batch_size": recipe.calibration.batch_size}
        cast(Fittable, method).fit(checkpoint, None, progress=progress, **options)

    def document(checkpoint: Checkpoint) -> dict[str, Any]:
        chosen = checkpoint.record.steps[-1].chosen
        right = f"Of the images it was fitted to, {chosen['accuracy']:.1%} are classified correctly."
        about: dict[str, Any] = {"classes": chosen["classes"], "curve": {}}
        about["modifiers"] = {method.slug: {"summary": right}}
        return classifier_document(checkpoint, name, training, None, **about)

    parts = SingleStep(training.digest, start, fit, document, report.classifier_page)
    return run_single_step(spec, out, parts, resume=resume, overwrite=overwrite)


def classifier_document(
    checkpoint: Checkpoint,
    model: str,
    training: LabelledExamples,
    validation: LabelledExamples | None,
    shared: int = 0,
    length: int | None = None,
    **about: Any,
) -> dict[str, Any]:
    """Return the report of a trained or attached classifier.

    Args:
        checkpoint: after training.
        model: name of the source.
        training: its data.
        validation: the data to score it on; None: it is not scored.
        shared: validation examples that are training examples too.
        length: maximum tokens of a text, as in training. Default: the model's context.
        about: `classes`, `curve` and `modifiers`. Default: those of the model and its training.
    """
    record = checkpoint.record.steps[-1]
    classes = about.get("classes") or label_names(checkpoint.model)
    skipped = [*training.skipped, *(() if validation is None else validation.skipped)]
    document: dict[str, Any] = {
        "format": report.FORMAT,
        "title": f"classifier trained on {training.name}",
        "model": model,
        "data": {
            "source": training.name, "kind": training.kind, "training": len(training),
            "validation": 0 if validation is None else len(validation), "in_both": shared, "skipped": skipped,
        },
        "classes": list(classes),
        "scores": {},
        "by_class": [],
        "mistakes": [],
        "curve": about.get("curve", record.chosen.get("curve")),
        "modifiers": about.get("modifiers", record.chosen.get("modifiers", {})),
        "parameters": record.parameters,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "device": str(checkpoint.device),
        "dtype": str(next(checkpoint.model.parameters()).dtype).removeprefix("torch."),
    }  # fmt: skip
    if validation is None:
        return document
    probs_NK = predict(checkpoint, validation.rows, length=length)
    gold, chosen = [row["label"] for row in validation.rows], [classes[index] for index in probs_NK.argmax(1).tolist()]
    f1 = f1_scores([gold], [chosen])
    wrong = [number for number, (a, b) in enumerate(zip(gold, chosen, strict=True)) if a != b]
    wrong.sort(key=lambda number: -float(probs_NK[number].max()))
    right = 1 - len(wrong) / len(gold)
    document["scores"] = {"accuracy": right, "macro_f1": sum(f1.values()) / len(f1)}
    document["by_class"] = [[name, gold.count(name), chosen.count(name), f1.get(name)] for name in classes]
    document["mistakes"] = [
        _shown(validation.rows[number], chosen[number], float(probs_NK[number].max())) for number in wrong[:MISTAKES]
    ]
    return document


def _shown(row: dict[str, Any], predicted: str, probability: float) -> dict[str, Any]:
    """Return a mistake with its text or thumbnail."""
    about = {"index": row["index"], "label": row["label"], "predicted": predicted, "probability": probability}
    return about | ({"png": thumbnail(row["image"], row["index"])} if "image" in row else {"text": row["text"]})
