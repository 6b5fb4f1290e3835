"""Rows and collators by which an objective trains in a stock `transformers.Trainer`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.trainer.causal_lm import IGNORED
from intaglio.trainer.dataset import read_rows
from intaglio.trainer.modified_loss import check_modifiers, modified_loss, session_reports
from intaglio.trainer.protocols import Batch, Example, Loss, Objective, TrainingModifier, TrainingRun
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
        ids: whether the batch has `id` [B], the ids of its rows, as modifiers need. Default False.
    """

    objective: Objective
    rng: KeyedRNG
    labels: bool = False
    ids: bool = False
    seen: Counter[int] = field(default_factory=Counter)

    def __call__(self, rows: Sequence[Example]) -> Batch:
        """Return the batch of some rows."""
        examples = [{**row, "epoch": self.seen[row["id"]], "step": 0} for row in rows]
        self.seen.update(row["id"] for row in rows)
        batch = self.objective.collate(examples, self.rng)
        if self.ids:
            batch = {**batch, "id": torch.tensor([row["id"] for row in rows])}
        return stock_batch(batch) if self.labels else batch


class ObjectiveModule(nn.Module):
    """Model and the modules that an objective owns, in one module for `Trainer(model=...)`.

    With modifiers, also pass `callbacks=[module.callback]`, collate with `EpochCollator(..., ids=True)`, and call
    `detach` after training. Their state is not saved in the checkpoints of a stock Trainer; `intaglio.train` resumes.

    Args:
        model: of the checkpoint, after `training_rows`; a `Checkpoint` itself for modifiers.
        objective: its `loss` is the forward pass.
        modifiers: training modifiers. Default: none.
        rows: those of `training_rows`, for modifiers. Default: none.
        steps: optimizer steps of the run, for modifiers that schedule by them. Default 0: not known.
        seed: of the modifiers. Default 0.
    """

    def __init__(
        self,
        model: nn.Module | Checkpoint,
        objective: Objective,
        modifiers: Sequence[TrainingModifier] = (),
        rows: Sequence[Example] = (),
        *,
        steps: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_modifiers(modifiers)
        checkpoint = model if isinstance(model, Checkpoint) else Checkpoint(model)
        self.model, self.owned, self._objective = checkpoint.model, objective.modules(), objective
        run = TrainingRun(
            checkpoint, steps, len(rows) or None, seed, self._plain_loss, examples=rows, objective=objective
        )
        self.modifiers, self.sessions = modifiers, [modifier.attach(run) for modifier in modifiers]
        groups = [group for session in self.sessions for group in session.param_groups()]
        self.modifier_parameters = nn.ParameterList([p for group in groups for p in group["params"]])
        self.callback = StepCallback(self)

    def _plain_loss(self, batch: Batch, model: nn.Module | None = None) -> Loss:
        return self._objective.loss(self.model if model is None else model, batch)

    def forward(self, **batch: Any) -> dict[str, Any]:
        """Return `loss`, that of a batch of `EpochCollator`; modifiers take part in training alone."""
        ids_B, sessions = batch.get("id"), self.sessions if self.training else []
        if sessions and ids_B is None:
            raise IntaglioError("the batch has no id, which modifiers need; collate with EpochCollator(..., ids=True)")
        inputs = {name: value for name, value in batch.items() if name not in ("weight", "id")}
        if sessions:
            self.callback.begin({**inputs, "id": ids_B})
        return {"loss": modified_loss(self._objective, self.model, inputs, ids_B, sessions).total}

    def detach(self) -> dict[str, dict[str, Any]]:
        """End the modifiers, and return their reports by slug or class name."""
        reports = session_reports(self.modifiers, self.sessions)
        for session in reversed(self.sessions):
            session.detach()
        return reports


class StepCallback(TrainerCallback):
    """Calls `before_step` and `after_step` of a module's modifiers in a stock Trainer."""

    def __init__(self, module: ObjectiveModule) -> None:
        self.module, self.step, self.begun = module, 1, 0

    def begin(self, batch: Batch) -> None:
        """Begin the step with its first batch."""
        if self.begun != self.step:
            self.begun = self.step
            for session in self.module.sessions:
                session.before_step(self.step, batch)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Follow up the step."""
        for session in self.module.sessions:
            session.after_step(self.step)
        self.step += 1


def stock_batch(batch: Batch) -> Batch:
    """Return a causal batch for a stock model, which shifts its `labels` itself."""
    rest = {name: value for name, value in batch.items() if name not in ("target", "weight")}
    # With a cache the stock models do not detect packed documents.
    return {**rest, "labels": F.pad(batch["target"][:, :-1], (1, 0), value=IGNORED), "use_cache": False}
