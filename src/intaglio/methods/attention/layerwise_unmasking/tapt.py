"""Task-adaptive pretraining (TAPT): next-token prediction on the task's own text before labels are learned.

The authors' loop trains with the same groups unmasked. There every unmasked layer sees the token to predict, so the
loss falls fast and means little; their alternative, and the default here, is the causal model, whose
checkpoint serves every configuration. In a recipe that is a `train` step with `labels` and no objective, before the
unmasking.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from intaglio.checkpoint import Checkpoint
from intaglio.data.token_classification import as_labelled
from intaglio.masks import get_visibility
from intaglio.masks.method import keep
from intaglio.trainer.causal_lm import CausalLM, causal_batch, cut, documents, next_token_loss, row_length
from intaglio.trainer.loop import TrainResult, train
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG


@dataclass(frozen=True)
class UnmaskedLM:
    """Next-token prediction without the check that the model cannot see the next token."""

    length: int | None = None

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Cut the examples into rows of one document."""
        return cut(documents(examples, checkpoint.vocabulary), row_length(checkpoint, self.length))

    def modules(self) -> nn.ModuleDict:
        """Return no modules."""
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return `causal_batch(examples)`."""
        return causal_batch(examples)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the next-token loss."""
        return next_token_loss(model, batch)


def adapt(
    checkpoint: Checkpoint,
    examples: Iterable[Mapping[str, Any]],
    *,
    unlocked: bool = False,
    length: int | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a decoder on the words of labelled examples as plain text, without their labels.

    Args:
        checkpoint: with its language-model head.
        examples: see `intaglio.data.token_classification`.
        unlocked: whether the visibility rules stay on, as in the authors' loop. Default False: the model is causal
            while it is trained, and the rules are restored afterwards.
        length: tokens of a row. Default: the model's context, at most 1,024.
        **settings: of `train`.

    Raises:
        IntaglioError: an example is malformed, or as `train`.
    """
    texts = [
        as_labelled(example, f"example {number} of the labelled data").text for number, example in enumerate(examples)
    ]
    if unlocked:
        return train(checkpoint, texts, objective=UnmaskedLM(length), **settings)
    rules = get_visibility(checkpoint.model)
    keep(checkpoint, {})
    try:
        return train(checkpoint, texts, objective=CausalLM(length), **settings)
    finally:
        keep(checkpoint, rules)
