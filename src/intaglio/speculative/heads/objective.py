"""Training heads on a frozen model, through the one training loop.

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
from intaglio.speculative.heads.static_tree import assumed
from intaglio.speculative.target_model import Reader
from intaglio.trainer.causal_lm import IGNORED, cut, documents, row_length
from intaglio.trainer.loop import TrainResult, train
from intaglio.trainer.preserve_state import preserve_grads, preserve_modes
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG

LENGTH = 256
"""Tokens of a row by default."""


class Heads(Protocol):
    """What is trained: an `nn.Module` that knows its loss on a frozen model."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As every module's."""

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of a batch.

        Args:
            model: frozen, in evaluation mode.
            batch: `input_ids` [B, T] padded behind with 0; `target` [B, T], the next token or -100; `scored` [B, T],
                where the model's own prediction counts (its next token belongs to an answer, or would be one's next).
        """


@dataclass
class HeadObjective:
    """What the loop trains: the heads, on rows that are one document or a piece of one.

    Args:
        settings: of the heads, for the identity of a run.
        length: tokens of a row. Default: 256, or the context where it is shorter.
        heads: what is trained.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    length: int | None = None
    heads: InitVar[Any] = None

    def __post_init__(self, heads: Any) -> None:
        self._owned = nn.ModuleDict({"heads": heads})

    def modules(self) -> nn.ModuleDict:
        """The heads."""
        return self._owned

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Cut examples into rows.

        Args:
            checkpoint: a causal decoder.
            examples: with `input_ids`, perhaps `labels`.
            rng: unused, nothing is random here.
        """
        length = row_length(checkpoint, min(LENGTH, checkpoint.context) if self.length is None else self.length)
        vocabulary = checkpoint.vocabulary
        return cut(documents(examples, vocabulary), length)

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Pad rows behind; see `Heads.loss`.

        Args:
            examples: rows.
            rng: unused.
        """
        return head_batch(examples)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The heads' loss, the model in evaluation mode.

        Args:
            model: frozen.
            batch: from `collate`.
        """
        with preserve_modes(model):
            model.eval()
            heads: Any = self._owned["heads"]
            found: Loss = heads.loss(model, batch)
            return found


def head_batch(rows: Sequence[Example]) -> Batch:
    """Rows as tensors; see `Heads.loss`. `weight` is the number of targets.

    Args:
        rows: `input_ids` and perhaps `labels`.
    """
    labels = [row["labels"] if row.get("labels") is not None else row["input_ids"] for row in rows]
    ids_BT = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels_BT = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    target_BT = torch.full_like(labels_BT, IGNORED)
    target_BT[:, :-1] = labels_BT[:, 1:]
    scored_BT = target_BT != IGNORED
    for row, label_T in enumerate(labels):  # what would follow the last token is predicted too, though not known
        scored_BT[row, len(label_T) - 1] = label_T[-1] != IGNORED
    return {"input_ids": ids_BT, "target": target_BT, "scored": scored_BT, "weight": int((target_BT != IGNORED).sum())}


@torch.no_grad()
def measured_chances(
    checkpoint: Checkpoint, heads: Any, examples: Sequence[Example], length: int, ranks: int = 8
) -> list[list[float]]:
    """How often the candidate of each rank is right, by level: what the static tree is made of.

    Args:
        checkpoint: the heads' own.
        heads: trained ones; see `Heads`.
        examples: with `input_ids` and `labels`.
        length: tokens of a row.
        ranks: looked at. Default 8.
    """
    goal = HeadObjective(length=length, heads=heads)
    right: Any = 0
    counts: Any = 0
    heads.eval()
    before, heads.ranks = heads.ranks, ranks
    try:
        for row in goal.prepare(checkpoint, [{**example, "id": n} for n, example in enumerate(examples)], KeyedRNG(0)):
            batch = {name: value.to(checkpoint.device) if isinstance(value, torch.Tensor) else value
                     for name, value in head_batch([row]).items()}  # fmt: skip
            found = goal.loss(checkpoint.model, batch).outputs
            if found is not None:
                right, counts = right + found.right_Kr, counts + found.counts_K[:, None]
    finally:
        heads.ranks = before
    if not isinstance(right, torch.Tensor):
        return []
    # As if every rank had been seen once more, with the chance that is assumed where nothing is known.
    prior = torch.tensor(assumed(len(right), right.shape[1]), device=right.device)
    shares: list[list[float]] = ((right + prior) / (counts + 1)).tolist()
    return [[round(share, 4) for share in level] for level in shares]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of a model take a gradient inside.

    Args:
        model: what stays as it is.
    """
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
        heads: see `Heads`; put on the model's device, in float32.
        data: examples, texts or what else `train` takes.
        settings: of the heads, for the identity of a run that may be resumed.
        length: tokens of a row. Default 256.
        directory: where the run keeps what it needs to go on after it was killed. Default: nowhere.
        resume: whether to go on with what is there. Default False.
        progress: called after each optimizer step.
        **how: budget, batches and optimizer; see `intaglio.train`.

    Returns:
        what the run did, and what the loop would have noted in the record.

    Raises:
        IntaglioError: a model that cannot be read through trees, or as `intaglio.train`.
    """
    Reader(checkpoint.model)  # an encoder, or attention that takes no mask: refused before any work
    heads.to(device=checkpoint.device, dtype=torch.float32)
    # The loop notes a training of the weights, which this is not: it goes into a record that is thrown away.
    shadow = Checkpoint(checkpoint.model, checkpoint.tokenizer, checkpoint.source)
    with frozen(checkpoint.model):
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
