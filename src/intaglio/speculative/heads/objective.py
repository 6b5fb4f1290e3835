"""Train heads on a frozen model, through the training loop.

Dimension letters: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from intaglio.checkpoint import Checkpoint
from intaglio.methods.base import Progress, no_progress
from intaglio.speculative.static_tree import default_acceptance
from intaglio.speculative.target_model import CachedModel
from intaglio.trainer.causal_lm import IGNORED, cut, documents, row_length
from intaglio.trainer.loop import TrainResult, train
from intaglio.trainer.preserve_state import preserve_grads, preserve_modes
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG

LENGTH = 256
"""Tokens of a row by default."""


class Heads(Protocol):
    """Trained modules: an `nn.Module` that computes its loss on a frozen model."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters, as every module does."""

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of a batch.

        Args:
            model: frozen, in evaluation mode.
            batch: `input_ids` [B, T] right-padded with 0; `target` [B, T], the next token or -100; `scored` [B, T],
                whether the model's own prediction counts (its next token belongs to an answer, or would extend it).
        """


@dataclass
class HeadObjective:
    """Objective of the heads, on rows that are one document or a piece of one.

    Args:
        settings: of the heads, for the identity of a run.
        length: tokens of a row. Default: 256, or the context if it is shorter.
        heads: the trained modules.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    length: int | None = None
    heads: InitVar[Any] = None

    def __post_init__(self, heads: Any) -> None:
        self._owned = nn.ModuleDict({"heads": heads})

    def modules(self) -> nn.ModuleDict:
        """Return the heads."""
        return self._owned

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Cut examples with `input_ids` and perhaps `labels` into rows."""
        length = row_length(checkpoint, min(LENGTH, checkpoint.context) if self.length is None else self.length)
        return cut(documents(examples, checkpoint.vocabulary), length)

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Right-pad rows; see `Heads.loss`."""
        return head_batch(examples)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the heads' loss, the model in evaluation mode."""
        with preserve_modes(model):
            model.eval()
            heads: Any = self._owned["heads"]
            loss: Loss = heads.loss(model, batch)
            return loss


def head_batch(rows: Sequence[Example]) -> Batch:
    """Return rows as tensors; see `Heads.loss`. `weight` is the number of targets."""
    labels = [row["labels"] if row.get("labels") is not None else row["input_ids"] for row in rows]
    ids_BT = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels_BT = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    target_BT = torch.full_like(labels_BT, IGNORED)
    target_BT[:, :-1] = labels_BT[:, 1:]
    scored_BT = target_BT != IGNORED
    for row, label_T in enumerate(labels):  # the token after the last one is predicted too, though unknown
        scored_BT[row, len(label_T) - 1] = label_T[-1] != IGNORED
    return {"input_ids": ids_BT, "target": target_BT, "scored": scored_BT, "weight": int((target_BT != IGNORED).sum())}


@torch.no_grad()
def measure_acceptance(
    checkpoint: Checkpoint, heads: Any, examples: Sequence[Example], length: int, ranks: int = 8
) -> list[list[float]]:
    """Return how often the candidate of each rank is right, by level, to build the static tree from.

    Args:
        checkpoint: the heads' own.
        heads: trained; see `Heads`.
        examples: with `input_ids` and `labels`.
        length: tokens of a row.
        ranks: candidates counted. Default 8.
    """
    objective = HeadObjective(length=length, heads=heads)
    right: Any = 0
    counts: Any = 0
    heads.eval()
    before, heads.ranks = heads.ranks, ranks
    try:
        for row in objective.prepare(
            checkpoint, [{**example, "id": n} for n, example in enumerate(examples)], KeyedRNG(0)
        ):
            batch = {name: value.to(checkpoint.device) if isinstance(value, torch.Tensor) else value
                     for name, value in head_batch([row]).items()}  # fmt: skip
            hits = objective.loss(checkpoint.model, batch).outputs
            if hits is not None:
                right, counts = right + hits.right_Kr, counts + hits.counts_K[:, None]
    finally:
        heads.ranks = before
    if not isinstance(right, torch.Tensor):
        return []
    # As if every rank had been counted once more, with its default acceptance.
    prior = torch.tensor(default_acceptance(len(right), right.shape[1]), device=right.device)
    shares: list[list[float]] = ((right + prior) / (counts + 1)).tolist()
    return [[round(share, 4) for share in level] for level in shares]


@contextmanager
def freeze(model: nn.Module) -> Iterator[None]:
    """Let no parameter of a model take a gradient inside."""
    with preserve_grads(model):
        model.requires_grad_(False)
        yield


def train_heads(
    checkpoint: Checkpoint,
    heads: Any,
    data: Any,
    *,
    settings: Mapping[str, Any],
    length: int | None = None,
    directory: Path | None = None,
    resume: bool = False,
    progress: Progress = no_progress,
    **how: Any,
) -> tuple[TrainResult, dict[str, Any]]:
    """Train heads in place; the model stays as it is, and so does the checkpoint's record.

    Args:
        checkpoint: a decoder.
        heads: see `Heads`; moved to the model's device, in float32.
        data: examples, texts or other data that `train` accepts.
        settings: of the heads, for the identity of a run that may be resumed.
        length: tokens of a row. Default 256.
        directory: for the state of a run that can be resumed. Default: none.
        resume: whether to continue from that state. Default False.
        progress: called after each optimizer step.
        **how: budget, batches and optimizer; see `intaglio.train`.

    Returns:
        the result of the run, and the entry that the loop would have written to the record.

    Raises:
        IntaglioError: a model that cannot be read through trees, or as `intaglio.train`.
    """
    CachedModel(checkpoint.model)  # an encoder, or attention that takes no mask: refused before any work
    heads.to(device=checkpoint.device, dtype=torch.float32)
    # The loop records a training of the weights, which this is not: the record is thrown away.
    shadow = Checkpoint(checkpoint.model, checkpoint.tokenizer, checkpoint.source)
    with freeze(checkpoint.model):
        done = train(
            shadow,
            data,
            objective=HeadObjective(dict(settings), length, heads),
            directory=directory,
            resume=resume,
            progress=progress,
            keep_mask=False,
            **how,
        )
    return done, shadow.record.steps[-1].chosen
