"""Rows and collators by which an objective trains in a stock `transformers.Trainer`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import nn

from intaglio.checkpoint import Checkpoint
from intaglio.trainer.causal_lm import IGNORED
from intaglio.trainer.dataset import read_rows
from intaglio.trainer.protocols import Batch, Example, Objective
from intaglio.trainer.rng import KeyedRNG


def training_rows(objective: Objective, checkpoint: Checkpoint, data: Any, rng: KeyedRNG) -> list[Example]:
    """Return the rows of an objective with their `id`, for `Trainer(train_dataset=...)`; `data` as `train` takes it."""
    return [{**row, "id": index} for index, row in enumerate(read_rows(checkpoint, data, objective, rng).read())]


@dataclass
class EpochCollator:
    """A data collator that counts how often it has seen each row, so that draws differ between epochs.

    Args:
        objective: its `collate` makes the batch.
        rng: the source of anything random.
        labels: whether the batch is one of a stock causal model, with `labels`, which computes the loss itself.
            Default: as the objective's `loss` takes it.
    """

    objective: Objective
    rng: KeyedRNG
    labels: bool = False
    seen: Counter[int] = field(default_factory=Counter)

    def __call__(self, rows: Sequence[Example]) -> Batch:
        """Return the batch of some rows."""
        examples = [{**row, "epoch": self.seen[row["id"]], "step": 0} for row in rows]
        self.seen.update(row["id"] for row in rows)
        batch = self.objective.collate(examples, self.rng)
        return stock_batch(batch) if self.labels else batch


class ObjectiveModule(nn.Module):
    """Model and the modules that an objective owns, in one module for `Trainer(model=...)`.

    Args:
        model: of the checkpoint, after `training_rows`.
        objective: its `loss` is the forward pass.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.owned, self._objective = model, objective.modules(), objective

    def forward(self, **batch: Any) -> dict[str, Any]:
        """Return `loss`, that of a batch of `EpochCollator`."""
        weightless = {name: value for name, value in batch.items() if name != "weight"}
        return {"loss": self._objective.loss(self.model, weightless).total}


def stock_batch(batch: Batch) -> Batch:
    """Return a causal batch for a stock model, which shifts its `labels` itself."""
    rest = {name: value for name, value in batch.items() if name not in ("target", "weight")}
    # With a cache the stock models do not detect packed documents.
    return {**rest, "labels": F.pad(batch["target"][:, :-1], (1, 0), value=IGNORED), "use_cache": False}
