"""Token classifiers: a stock model's body with a labelling head, in transformers' own classes.

    logits_BTL = Linear(Dropout(h_BTD))         h: the final-norm hidden states; with a bias

For families without such a class, one is composed of transformers' generic parts. Their checkpoints need Intaglio to
load: the stock loader does not know the class.

Dimension letters: B rows, T tokens, D width, L labels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForTokenClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, MODEL_MAPPING

from intaglio.errors import IntaglioError

SLUG = "token_classification"
PLACE = "labelled_token"
"""Key of config.json: the token of a word that carries its label."""


def is_classifier(config: Any) -> bool:
    """Return whether a configuration names a token classifier."""
    return any(str(name).endswith("ForTokenClassification") for name in getattr(config, "architectures", None) or ())


def classifier_class(config: Any) -> type[Any]:
    """Return the token classifier class of a configuration's family."""
    if type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        known: type[Any] = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[type(config)]
        return known
    if type(config) not in MODEL_MAPPING:
        raise IntaglioError(f"the model type {config.model_type!r} has no base model, so it cannot label tokens")
    base = MODEL_MAPPING[type(config)]
    name = base.__name__.removesuffix("Model") + "ForTokenClassification"
    if name not in _COMPOSED:
        # The family's base class, for the names and initial values of weights, with transformers' generic head.
        parent = next(kind for kind in base.__mro__[1:] if issubclass(kind, PreTrainedModel))
        _COMPOSED[name] = type(name, (GenericForTokenClassification, parent), {"__module__": __name__})
        setattr(sys.modules[__name__], name, _COMPOSED[name])  # so that it can be pickled
    return _COMPOSED[name]


_COMPOSED: dict[str, type[Any]] = {}


def classification_head(model: Any) -> nn.Linear | None:
    """Return the labelling head of a token classifier; None for any other model."""
    if not type(model).__name__.endswith("ForTokenClassification"):
        return None
    return cast(nn.Linear, getattr(model, "score", getattr(model, "classifier", None)))


def label_names(model: Any) -> tuple[str, ...]:
    """Return the labels of a token classifier in the order of its logits."""
    return tuple(model.config.id2label[index] for index in range(model.config.num_labels))


def label_fields(labels: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a configuration that name the labels."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


class _Checkpoint(Protocol):
    """The part of a `Checkpoint` that is edited here; its own module imports this one."""

    model: nn.Module

    def set_runtime_state(self, slug: str, part: dict[str, Any] | None) -> None: ...


def to_classifier(
    checkpoint: _Checkpoint, labels: Sequence[str], *, dropout: float = 0.1, place: str = "first", seed: int = 0
) -> None:
    """Turn a checkpoint's model into a token classifier: keep its body, replace its head by a new one.

    A classifier with the same labels keeps its head. Attention masks stay as they are.

    Args:
        checkpoint: a `Checkpoint`, whose model is replaced; the body's modules are the same objects.
        labels: names in the order of the logits.
        dropout: before the head, while training. Default 0.1.
        place: the token of a word that carries its label: `first`, `last` or `all`; noted in the configuration.
        seed: of the head's weights, normal with deviation `initializer_range`; its bias is 0.

    Raises:
        IntaglioError: the family cannot label tokens, or the model labels with other labels.
    """
    model: Any = checkpoint.model
    if classification_head(model) is not None:
        if label_names(model) != tuple(labels):
            known, new = ", ".join(label_names(model)), ", ".join(labels)
            raise IntaglioError(f"the model labels with {known}, and the examples with {new}; start from another model")
        model.config.update({PLACE: place})
        return
    config = model.config
    cls = classifier_class(config)
    config.update(
        {
            **label_fields(labels),
            "classifier_dropout": dropout,
            "architectures": [cls.__name__],
            PLACE: place,
        }
    )
    body, weight = model.base_model, next(model.parameters())
    with torch.device("meta"):
        shell = cls(config)
    setattr(shell, shell.base_model_prefix, body)
    for name, child in shell.named_children():  # such as the layer that some encoders have between body and head
        if type(getattr(model, name, None)) is type(child) and not isinstance(child, nn.Linear):
            setattr(shell, name, getattr(model, name))
    head = classification_head(shell)
    if head is None:
        raise IntaglioError(f"no labelling head could be identified in {cls.__name__}")
    head.to_empty(device=weight.device).to(weight.dtype)
    drawn = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        head.weight.copy_(drawn * float(getattr(config, "initializer_range", 0.02)))
        if head.bias is not None:
            head.bias.zero_()
    left = [name for name, value in [*shell.named_parameters(), *shell.named_buffers()] if value.is_meta]
    if left:
        raise IntaglioError(f"{cls.__name__} has more than a body and a head: {left[0]}")
    checkpoint.model = shell.train(model.training)
    checkpoint.set_runtime_state(SLUG, None if type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING else {})
