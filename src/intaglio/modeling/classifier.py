"""Classifiers of texts and images: a stock model's body with a new head, in transformers' own classes.

A text's class is `AutoModelForSequenceClassification`'s, an image's `AutoModelForImageClassification`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from intaglio.errors import IntaglioError
from intaglio.modeling.token_classifier import classification_head, label_fields, label_names

SUFFIXES = ("ForSequenceClassification", "ForImageClassification")


def is_image_model(config: Any) -> bool:
    """Return whether a configuration is that of a model of images; BEiT's `vocab_size` is that of visual tokens."""
    texts = hasattr(config, "vocab_size") and type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    return not texts and hasattr(config, "num_channels")


def whole_input_class(config: Any) -> type[Any]:
    """Return the classifier class of a configuration's family.

    Raises:
        IntaglioError: transformers has none.
    """
    images = is_image_model(config)
    mapping = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING if images else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in mapping:
        what = "images" if images else "texts"
        raise IntaglioError(f"transformers has no classifier of {what} for the model type {config.model_type!r}")
    cls = mapping[type(config)]
    return cast(type[Any], cls[0] if isinstance(cls, tuple) else cls)


def names_classifier(config: Any) -> bool:
    """Return whether a configuration names a classifier of whole texts or images."""
    return any(str(name).endswith(SUFFIXES) for name in getattr(config, "architectures", None) or ())


def is_whole_input_classifier(model: Any) -> bool:
    """Return whether a model classifies whole texts or images."""
    return type(model).__name__.endswith(SUFFIXES)


def logits_layer(model: nn.Module) -> nn.Linear | None:
    """Return the linear layer whose outputs are the logits of a classifier: its last one; None if there is none."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linears[-1] if linears else None


def head_modules(model: Any) -> list[nn.Module]:
    """Return the modules of a classifier's head, which are new and trained in full; none for other models."""
    labelling = classification_head(model)
    if labelling is not None:
        return [labelling]
    if not is_whole_input_classifier(model):
        return []
    return [child for name, child in model.named_children() if name != model.base_model_prefix]


def make_classifier(checkpoint: Any, labels: Sequence[str], *, seed: int = 0, dropout: float | None = None) -> None:
    """Turn a checkpoint's model into a classifier: keep its body, replace its head by a new one.

    A classifier with the same labels keeps its head.

    Args:
        checkpoint: a `Checkpoint`, whose model is replaced; the body's modules are the same objects.
        labels: names in the order of the logits.
        seed: of the head's weights, drawn by transformers' own rule.
        dropout: before the head, where the family has such. Default: the configuration's.

    Raises:
        IntaglioError: the family has no classifier, or the model has other labels.
    """
    model = checkpoint.model
    if is_whole_input_classifier(model):
        if label_names(model) != tuple(labels):
            known, new = ", ".join(label_names(model)), ", ".join(labels)
            raise IntaglioError(f"the model has the classes {known}, and the examples {new}; start from another model")
        return
    config = model.config
    cls = whole_input_class(config)
    config.update(
        {
            **label_fields(labels),
            "architectures": [cls.__name__],
            "problem_type": "single_label_classification",
            **({} if dropout is None else {"classifier_dropout": dropout}),
        }
    )
    if not is_image_model(config) and config.pad_token_id is None and checkpoint.tokenizer is not None:
        # Decoders find a text's last token by it.
        pad, end = checkpoint.tokenizer.pad_token_id, checkpoint.tokenizer.eos_token_id
        config.pad_token_id = end if pad is None else pad
    weight = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = cls(config)
    whole.to(weight.device, weight.dtype)
    body, fresh = model.base_model, whole.base_model
    for name in {*dict(body.named_children()), *dict(fresh.named_children())}:
        # Poolers, which some classifiers have and other models of the family lack.
        if getattr(body, name, None) is None or getattr(fresh, name, None) is None:
            setattr(body, name, getattr(fresh, name, None))
    setattr(whole, whole.base_model_prefix, body)
    checkpoint.model = whole.train(model.training)
