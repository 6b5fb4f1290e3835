"""Classification of texts and images: the objective, prediction and evaluation.

    L = -(1/B) sum_n sum_k q_nk log softmax(z_n)_k       q: one-hot labels, or `targets`
    L = -(1/B) sum_n sum_k [q_nk log sigmoid(z_nk) + (1 - q_nk) log(1 - sigmoid(z_nk))]      (binary cross-entropy)

The model becomes transformers' own classifier (`AutoModelForSequenceClassification`,
`AutoModelForImageClassification`), so the stock loader and pipelines read it.

Dimension letters: B rows, T tokens, C channels, H and W pixels, D features, K classes, N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.data.labelled_images import read_image
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.measures.embeddings import Pooling, pool
from intaglio.measures.token_classification import accuracy, macro_f1
from intaglio.methods.base import Capability, Method, ModelAspect, Progress, TrainingData, no_progress
from intaglio.modeling.classifier import is_image_model, is_whole_input_classifier, logits_layer, make_classifier
from intaglio.modeling.token_classifier import label_names
from intaglio.trainer.causal_lm import row_length
from intaglio.trainer.dataset import read_rows
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG
from intaglio.trainer.shown_examples import PIXELS
from intaglio.trainer.token_classification import padded

UNLABELLED = -1
"""Number of the label of examples without a class."""
INPUTS = (PIXELS, "input_ids", "attention_mask")
"""Keys of a batch that the model takes."""


@dataclass(frozen=True)
class Classified:
    """Outputs of a classifier for a batch.

    Args:
        logits: float32 [B, K].
        features: [B, D], the inputs of the last linear layer; None where the model has none.
        targets: float32 [B, K], the distribution over the classes that the loss was taken with, without smoothing.
    """

    logits: Tensor
    features: Tensor | None
    targets: Tensor


class Classification(Method, slug="classification"):
    """Classification of whole texts or images by cross-entropy.

    An example is `{text, label}`, `{image, label}` (a file, an array or a PIL image), or `{pixel_values, label}` with a
    number as its label, float32 [C, H, W], for any module that maps pixels [B, C, H, W] to logits [B, K]. Its batch is
    `{pixel_values}` or `{input_ids, attention_mask}`, with `labels`, int64 [B]; a training modifier may put `targets`,
    float32 [B, K], beside the labels, and other inputs (see `ModifierSession.change_batch`).

    Args:
        labels: the classes in the order of the logits. Default: those of the training examples, sorted.
        unlabelled: the label of examples without a class, which the modifier `decoupled_mixup` trains on; their number
            in `labels` of a batch is -1. Default: every example has a class.
        loss_type: `cross_entropy` (default), or `binary_cross_entropy`, of each class against the others, summed over
            the classes.
        label_smoothing: share of each target that is spread evenly over all classes. Default 0.
        dropout: before the head, for texts. Default: the model's own.
        length: maximum tokens of a text; longer ones are cut. Default: the model's context, at most 1,024.
    """

    kinds = ("objective",)
    summary = "classifies whole texts or images by cross-entropy"

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    invalidates: ClassVar[frozenset[Capability]] = frozenset({"causal"})
    storage: ClassVar[str] = "standalone"
    trains_on: ClassVar[TrainingData] = "classes"

    labels: list[str] | None = None
    unlabelled: str | None = None
    loss_type: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    length: Annotated[int, Field(ge=2)] | None = None

    @field_validator("labels")
    @classmethod
    def _different(cls, labels: list[str] | None) -> list[str] | None:
        if labels is not None and not 2 <= len(labels) == len(set(labels)):
            raise ValueError(f"labels are {', '.join(labels)}; at least two classes are needed, each named once")
        return labels

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Make the model a classifier, unless it is one, and turn examples into rows of tensors.

        `rng` seeds the head. While evaluating, labels that training has not seen are refused.
        """
        if not hasattr(checkpoint.model, "config"):
            return examples  # a bare module on pixels
        if self.labels is None and not is_whole_input_classifier(checkpoint.model):
            examples = list(examples)
            given = {_label(number, example) for number, example in enumerate(examples)}
            names = tuple(sorted(given - {self.unlabelled}))
        else:
            names = tuple(self.labels or label_names(checkpoint.model))
        if len(names) < 2:
            raise IntaglioError(f"the examples have {len(names)} different labels; at least two are needed")
        make_classifier(checkpoint, names, seed=rng.seed, dropout=self.dropout)
        return self._rows(checkpoint, examples, names, rng)

    def _rows(
        self, checkpoint: Checkpoint, examples: Iterable[Example], names: Sequence[str], rng: KeyedRNG
    ) -> Iterator[Example]:
        number, images = {name: index for index, name in enumerate(names)}, is_image_model(checkpoint.config)
        if self.unlabelled is not None and rng.training:
            number[self.unlabelled] = UNLABELLED
        length = 0 if images else row_length(checkpoint, self.length)
        for index, example in enumerate(examples):
            label = _label(index, example)
            if label not in number:
                raise IntaglioError(f"example {index} has the label {label!r}; {did_you_mean(label, number)}")
            inputs = _pixels(checkpoint, example, index) if images else _tokens(example, index, length)
            yield {**inputs, "label": number[label], "index": str(example.get("index", index))}

    def modules(self) -> nn.ModuleDict:
        """Return no modules: the head belongs to the model."""
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return the inputs of the model and `labels` [B]."""
        labels_B = torch.tensor([int(example["label"]) for example in examples])
        if PIXELS in examples[0]:
            inputs: Batch = {PIXELS: torch.stack([example[PIXELS] for example in examples])}
        else:
            inputs = padded([example["input_ids"] for example in examples])
        return {**inputs, "labels": labels_B, "weight": len(labels_B)}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the mean loss of a batch, in nats a row, with the accuracy against the likeliest target."""
        if self.unlabelled is not None and "targets" not in batch and bool((batch["labels"] < 0).any()):
            raise IntaglioError("a batch has unlabelled examples; add the modifier decoupled_mixup")
        logits_BK, features_BD = classifier_outputs(model, batch)
        targets_BK = class_targets(batch, logits_BK.shape[1])
        if self.loss_type == "binary_cross_entropy":
            smooth_BK = targets_BK * (1 - self.label_smoothing) + self.label_smoothing / logits_BK.shape[1]
            each_B = F.binary_cross_entropy_with_logits(logits_BK, smooth_BK, reduction="none").sum(1)
            total = each_B.mean()
        else:
            goal = batch["targets"] if "targets" in batch else batch["labels"]
            total = F.cross_entropy(logits_BK, goal, label_smoothing=self.label_smoothing)
        right = (logits_BK.argmax(1) == targets_BK.argmax(1)).float().mean()
        return Loss(total, {"accuracy": right.detach()}, outputs=Classified(logits_BK, features_BD, targets_BK))


def _label(number: int, example: Example) -> str:
    label = example.get("label")
    if not isinstance(label, (str, int)) or isinstance(label, bool) or not str(label).strip():
        raise IntaglioError(f"example {number} has the label {label!r}; a class, a string, is needed")
    return str(label)


def _tokens(example: Example, number: int, length: int) -> Example:
    if "input_ids" not in example:
        raise IntaglioError(f"example {number} has no text; text and label are needed")
    ids = list(example["input_ids"])
    return {"input_ids": torch.tensor(ids if len(ids) <= length else [*ids[: length - 1], ids[-1]])}


def _pixels(checkpoint: Checkpoint, example: Example, number: int) -> Example:
    if PIXELS in example:
        return {PIXELS: example[PIXELS]}
    if "image" not in example:
        raise IntaglioError(f"example {number} has no image; image and label are needed")
    if checkpoint.image_processor is None:
        raise IntaglioError("the checkpoint has no image processor; give examples with pixel_values")
    image_HWC = read_image(example["image"], str(example.get("index", number)), int(checkpoint.config.num_channels))
    made = checkpoint.image_processor(image_HWC, input_data_format="channels_last", return_tensors="pt")
    return {PIXELS: made[PIXELS][0].to(torch.float32)}


def class_targets(batch: Batch, classes: int) -> Tensor:
    """Return the targets of a batch, float32 [B, K]: its `targets`, or its labels as one-hot rows."""
    if "targets" in batch:
        targets_BK: Tensor = batch["targets"]
        return targets_BK
    return F.one_hot(batch["labels"], classes).to(torch.float32)


def classifier_outputs(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return the logits, float32 [B, K], and the features [B, D] of a batch (None where there is no linear layer)."""
    layer = logits_layer(model)
    seen: list[Tensor] = []
    ids_BT: Tensor | None = None
    handle = None if layer is None else layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        if PIXELS in batch:
            output = model(batch[PIXELS])
        else:
            ids_BT = batch["input_ids"]
            pad = getattr(model.config, "pad_token_id", None)
            if pad is not None:
                ids_BT = ids_BT.masked_fill(batch["attention_mask"] == 0, pad)
            output = model(input_ids=ids_BT, attention_mask=batch["attention_mask"])
    finally:
        if handle is not None:
            handle.remove()
    logits_BK: Tensor = getattr(output, "logits", output).float()
    features = seen[-1] if seen else None
    if features is not None and features.dim() == 3 and ids_BT is not None:
        # Decoders classify every token, and pick the last that is no padding.
        last_B = ((ids_BT != pad) * torch.arange(ids_BT.shape[1], device=ids_BT.device)).argmax(1)
        features = features[torch.arange(len(features), device=features.device), last_B]
    return logits_BK, features if features is not None and features.dim() == 2 else None


@torch.no_grad()
def predict(
    checkpoint: Checkpoint, examples: Sequence[Mapping[str, Any]], *, batch_size: int = 32, length: int | None = None
) -> Tensor:
    """Return the probability of each class for some texts or images.

    Args:
        checkpoint: a classifier.
        examples: `{text}` or `{image}` each; labels are ignored and may be missing.
        batch_size: rows of a batch. Default 32.
        length: maximum tokens of a text. Default: the model's context, at most 1,024.

    Returns:
        Float32 [N, K], on the CPU; `label_names(checkpoint.model)` names the classes.

    Raises:
        IntaglioError: the model is no classifier, or an example is malformed.
    """
    if not is_whole_input_classifier(checkpoint.model):
        name = type(checkpoint.model).__name__
        raise IntaglioError(f"{name} does not classify; train it by the objective classification")
    first = label_names(checkpoint.model)[0]
    rows = _read(checkpoint, [{**example, "label": first} for example in examples], length)
    return torch.cat([probs for probs, _ in _batches(checkpoint, rows, batch_size)])


@torch.no_grad()
def embed_images(
    checkpoint: Checkpoint,
    examples: Sequence[Mapping[str, Any]],
    how: Pooling | None = None,
    *,
    batch_size: int = 32,
    progress: Progress = no_progress,
    label: str = "embedding",
) -> Tensor:
    """Embed images; float32 [N, D] on the CPU, not normalised.

    Args:
        checkpoint: a model of images with its image processor, or a classifier of `pixel_values`.
        examples: `{image}` each, perhaps with `index`, the image's name in messages.
        how: pooling of the last hidden states over the positions. Default: the inputs of a classifier's last linear
            layer; of a model without a head, the mean.
        batch_size: images of a batch. Default 32.
        progress: called after each batch with `label`.

    Raises:
        IntaglioError: an image is broken, or the checkpoint has no image processor.
    """
    model, weight = checkpoint.model.eval(), next(checkpoint.model.parameters())
    from_head = how is None and is_whole_input_classifier(model)
    vectors = []
    for start in range(0, len(examples), batch_size):
        numbered = enumerate(examples[start : start + batch_size], start)
        pixels_BCHW = torch.stack([_pixels(checkpoint, dict(example), number)[PIXELS] for number, example in numbered])
        pixels_BCHW = pixels_BCHW.to(weight.device, weight.dtype)
        features_BD = classifier_outputs(model, {PIXELS: pixels_BCHW})[1] if from_head else None
        if features_BD is None:
            hidden = model.base_model(pixels_BCHW).last_hidden_state  # type: ignore[operator]
            features_BD = pool(hidden.flatten(2).mT if hidden.dim() == 4 else hidden, None, how or "mean")
        vectors.append(features_BD.float().cpu())
        progress(min(start + batch_size, len(examples)), len(examples), label)
    return torch.cat(vectors)


def embedding_width(checkpoint: Checkpoint) -> int:
    """Return the width D of a model's embeddings of texts or images."""
    config = checkpoint.config
    layer = logits_layer(checkpoint.model) if is_whole_input_classifier(checkpoint.model) else None
    if is_image_model(config) and layer is not None:
        return layer.in_features
    stages = getattr(config, "hidden_sizes", None)
    return int(stages[-1] if stages else getattr(config, "hidden_size", None) or config.hidden_dim)


def _read(checkpoint: Checkpoint, examples: Sequence[Any], length: int | None) -> list[Example]:
    rng = KeyedRNG(0, training=False)
    return list(read_rows(checkpoint, list(examples), Classification(length=length), rng).read())


def _batches(checkpoint: Checkpoint, rows: Sequence[Example], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the probabilities and the labels of batches of rows, in evaluation mode."""
    model, goal, rng = checkpoint.model, Classification(), KeyedRNG(0, training=False)
    before = model.training
    model.eval()
    try:
        for start in range(0, len(rows), size):
            batch = goal.collate(rows[start : start + size], rng)
            inputs = {name: batch[name].to(checkpoint.device) for name in INPUTS if name in batch}
            yield classifier_outputs(model, inputs)[0].softmax(1).cpu(), batch["labels"]
    finally:
        model.train(before)


def make_evaluator(
    examples: Sequence[Mapping[str, Any]], *, batch_size: int = 32, length: int | None = None
) -> Callable[[Checkpoint], dict[str, float]]:
    """Return a function that scores a classifier on labelled examples, for `train(evaluate=...)` or on its own.

    Args:
        examples: texts or images with labels.
        batch_size: rows of a batch. Default 32.
        length: maximum tokens of a text. Default: as `predict`.

    Returns:
        A function of the checkpoint: `accuracy`, `macro_f1`, `error` (1 - accuracy) and `loss`, the mean negative
        log-likelihood of the labels in nats.
    """
    rows: list[Example] = []

    @torch.no_grad()
    def evaluator(checkpoint: Checkpoint) -> dict[str, float]:
        if not rows:
            rows.extend(_read(checkpoint, examples, length))
        parts = list(_batches(checkpoint, rows, batch_size))
        return scores(torch.cat([probs for probs, _ in parts]), torch.cat([labels for _, labels in parts]))

    return evaluator


def scores(probs_NK: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Return accuracy, macro-F1, error and mean negative log-likelihood of probabilities."""
    gold = [[str(label) for label in labels_N.tolist()]]
    predicted = [[str(label) for label in probs_NK.argmax(1).tolist()]]
    right = accuracy(gold, predicted)
    likelihood_N = probs_NK[torch.arange(len(labels_N)), labels_N].clamp(min=torch.finfo(torch.float32).tiny)
    loss = float(-likelihood_N.log().mean())
    return {"accuracy": right, "macro_f1": macro_f1(gold, predicted), "error": 1 - right, "loss": loss}
