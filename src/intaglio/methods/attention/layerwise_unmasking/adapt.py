"""Task-adaptive pretraining (TAPT): next-token prediction on the task's own text before labels are learned.

The authors' loop trains with the same groups unmasked. There every unmasked layer sees the token that is to be
predicted, so the loss falls fast and says little; their alternative, and the default here, is the causal model, whose
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
class SeeingLM:
    """Next-token prediction by a model that may see the token, without the test that refuses this.

    Args:
        length: tokens of a row. Default: the model's context, at most 1,024.
    """

    length: int | None = None

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Cut the examples into rows of one document.

        Args:
            checkpoint: a decoder with its language-model head.
            examples: with `input_ids`.
            rng: not used.
        """
        rows = checkpoint.vocabulary
        return cut(documents(examples, rows), row_length(checkpoint, self.length))

    def modules(self) -> nn.ModuleDict:
        """None."""
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
    """Train a decoder on the words of labelled examples as plain text; their labels are not looked at.

    Args:
        checkpoint: with its language-model head.
        examples: see `intaglio.data.token_classification`.
        unlocked: whether rules stay on meanwhile, as in the authors' loop. Default False: the model is causal while it
            is trained, and sees as before afterwards.
        length: tokens of a row. Default: the model's context, at most 1,024.
        **settings: of `train`.

    Raises:
        IntaglioError: an example is malformed, or as `train`.
    """
    texts = [
        as_labelled(example, f"example {number} of the labelled data").text for number, example in enumerate(examples)
    ]
    if unlocked:
        return train(checkpoint, texts, objective=SeeingLM(length), **settings)
    rules = get_visibility(checkpoint.model)
    keep(checkpoint, {})
    try:
        return train(checkpoint, texts, objective=CausalLM(length), **settings)
    finally:
        keep(checkpoint, rules)
