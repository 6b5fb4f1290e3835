"""Protocols of the training loop: objectives, training modifiers, selectors.

An objective is data, loss and the modules it owns. It knows nothing of optimizers, devices or resuming, so it works
with any model that its loss fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.methods.base import Cost, Progress, Workload
from intaglio.trainer.rng import KeyedRNG

Example = dict[str, Any]
"""One training example. The loop adds `id` (its index in the data), `epoch`, `step` (the optimizer's, from 0) and
`steps`, those of the run."""

Batch = dict[str, Any]
"""A collated batch: tensors by name, which the loop moves to the model's device.

The loop takes `weight` out: the weight of the batch within its optimizer step, such as the number of predicted tokens.
Without it, batches are weighted by their rows."""


@dataclass(frozen=True)
class Loss:
    """The loss of a batch.

    Args:
        total: scalar to minimise, a mean over the batch.
        parts: named scalars to log, tensors or plain numbers. Default: none.
        outputs: the model's outputs, for modifiers that read them. Default None.
    """

    total: Tensor
    parts: Mapping[str, Tensor | float] = field(default_factory=dict)
    outputs: Any = None


@dataclass
class TrainingRun:
    """A training run as a modifier sees it.

    Args:
        checkpoint: the checkpoint in training (a bare module is wrapped in one). A modifier whose result needs
            Intaglio to load notes it there.
        steps: optimizer steps of the whole run.
        rows: rows of the data, with ids 0 to rows - 1; None for a stream.
        seed: seed of the run.
        loss: `loss(batch)`, the objective's loss of a batch with its gradient, in the run's precision and without the
            modifiers' terms: for modifiers that take steps of their own. `loss(batch, model)`: that of another model.
        gradient_accumulation_steps: batches of an optimizer step, whose gradients are averaged. Default 1.
        examples: the rows as the objective prepared them. Default: none, as for a stream.
        weight_decay: of the run's matrices, for `param_groups`. Default 0.
        objective: what is predicted. Default None.
        held_out: `held_out(n)`, batch n of the rows that were held out for a modifier with a `held_out_share`, in a new
            order in each pass, for `loss`; the same in every process. Default None: no modifier has one.
        optimizer: None until every modifier is attached. `before_step` may change its groups.
    """

    checkpoint: Checkpoint
    steps: int
    rows: int | None
    seed: int
    loss: Callable[..., Loss]
    gradient_accumulation_steps: int = 1
    examples: Sequence[Example] = ()
    weight_decay: float = 0.0
    objective: Objective | None = None
    held_out: Callable[[int], Batch] | None = None
    optimizer: torch.optim.Optimizer | None = None

    @property
    def model(self) -> nn.Module:
        """The model in training."""
        return self.checkpoint.model


@runtime_checkable
class Objective(Protocol):
    """Prediction target: data collation and loss.

    A class with `disables_dropout = True` trains without the dropout of the model and of adapters. With
    `leaves_parameters = True` some parameters of the model may have no gradient, such as the head of an encoder.
    """

    def modules(self) -> nn.ModuleDict:
        """Return the modules that the objective owns, which are trained and saved with the model. Empty for most."""

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Make a batch of examples.

        Args:
            examples: rows, each with its `id`, `epoch` and `step`.
            rng: `rng(example)` is the example's own `torch.Generator`. Draw everything random from it, so that a
                resumed run, another batch size or several processes give the same data. `rng.training` is False while
                evaluating.
        """

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of a batch.

        Args:
            model: the model, in training mode (in evaluation mode while evaluating).
            batch: from `collate`, on the model's device.
        """


@runtime_checkable
class Prepares(Protocol):
    """An objective that turns the user's examples into rows once, before the loop: packing, instruction pairs."""

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Return the rows to train on, lazily where the examples are a stream.

        Args:
            checkpoint: the checkpoint in training; its vocabulary may grow here.
            examples: the user's examples with their `id`, texts already tokenised.
            rng: draws that stay the same over epochs.
        """


class ModifierSession:
    """A modifier at work on one run. Every hook does nothing by default: override those that are needed.

    A training batch passes the hooks in this order, each hook through all sessions:

    1. `before_step`, before the first batch of an optimizer step;
    2. `change_batch`, which returns the batch to train on: other inputs, other `labels`, or `targets`. Objectives that
       classify read `targets`, float32 [B, K] (a distribution over the classes for each row), in place of `labels`; so
       mixing inputs is `{**batch, "pixel_values": mixed, "targets": mixed_targets}`;
    3. `forward_context`, inside which the objective runs the model on that batch, and nothing else does. Mixing hidden
       states or embeddings hooks the modules there, and agrees with `change_batch` on pairs and rates by attributes of
       the session;
    4. `extra_loss`, which sees the changed batch and the model's outputs (`Classified` of objectives that classify:
       logits, features), and may run the model again outside the context;
    5. `after_step`, after the optimizer.

    Draw everything random from `trainer.rng.generator(run.seed, name, step, *ids)`, which a resumed run repeats. An
    evaluation passes none of the hooks.

    In a distributed run each process has its own session, and all must reach the same state: what a session learns
    from a batch must come from the batches of all processes.
    """

    def before_step(self, step: int, batch: Batch) -> None:
        """Prepare optimizer step `step` (from 1), which begins with `batch`."""

    def after_step(self, step: int) -> None:
        """Follow up optimizer step `step` (from 1)."""

    def change_batch(self, model: nn.Module, batch: Batch) -> Batch:
        """Return the batch to train on.

        Args:
            model: the model.
            batch: the objective's, changed by earlier sessions, with `id`, int64 [B]: the ids of its rows. Leave it as
                it is, and return another dict.
        """
        return batch

    def forward_context(self, model: nn.Module, batch: Batch) -> AbstractContextManager[Any]:
        """Return a context for the objective's forward pass on a batch of `change_batch`.

        Gradient checkpointing runs parts of the model again after the context has ended: refuse it in `attach` where
        that matters.
        """
        return nullcontext()

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss | None:
        """Return a term to add to the objective's loss of a training batch, or None.

        Args:
            model: the model.
            batch: that of `change_batch`, with `id`, int64 [B]: the ids of its rows.
            outputs: `outputs` of the objective's `Loss`.
        """
        return None

    def param_groups(self) -> list[dict[str, Any]]:
        """Return parameters with optimizer settings of their own, as `torch.optim` takes them."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs and the model does not hold: tensors and plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`, after `attach`."""

    def report(self) -> dict[str, Any]:
        """Return plain data for the record once training has ended.

        A report of classifiers draws `tables` (`title`, `headings`, `rows` of text) and `thumbnails` (`title`, `items`:
        PNG in base64 and a caption each).
        """
        return {}

    def attachment(self) -> dict[str, Tensor]:
        """Return tensors to attach to the checkpoint under the modifier's slug once training has ended."""
        return {}

    def detach(self) -> None:
        """Bake the result into plain tensors and leave a stock model, or note in the record what loading needs."""


@runtime_checkable
class TrainingModifier(Protocol):
    """A technique that changes how a model trains: schedules, regularizers, masks and quantizers.

    The modifier itself is immutable configuration; all state lives in the session. A class with
    `trains_weights = True` is refused beside adapters or frozen weights before a model loads. Its `held_out_share`, if
    it has one above 0, is the share of the rows that are not trained on but given to it as `TrainingRun.held_out`.
    """

    def attach(self, run: TrainingRun) -> ModifierSession:
        """Prepare the model, before the optimizer exists. A resumed run attaches again and then loads the state."""


@runtime_checkable
class HasTrainingCost(Protocol):
    """A modifier or selector that makes training noticeably dearer: passes, selections, memory."""

    def training_cost(self, workload: Workload, steps: float, batch_tokens: int, pass_flops: float) -> Cost:
        """Return the cost on top of the steps themselves.

        Args:
            workload: the model's.
            steps: optimizer steps.
            batch_tokens: tokens of a batch.
            pass_flops: operations of a forward and backward pass of the step's first batch.
        """


@dataclass(frozen=True, eq=False)
class Selection(Sequence[int]):
    """Selected indices with metadata for the report.

    Args:
        indices: indices into the examples.
        metadata: plain data for the record and the report. `bars` is drawn (see `report.document`); `seconds`, by
            phase, goes to the report alone. Default: none.
    """

    indices: Sequence[int]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, position: Any) -> Any:
        """Return the index at a position, or the indices of a slice."""
        return self.indices[position]

    def __len__(self) -> int:
        """Return the number of selected examples."""
        return len(self.indices)


@runtime_checkable
class Selector(Protocol):
    """A choice of the examples to train on.

    With `compares = False`, as an attribute or property, no original checkpoint is loaded for it.

    Args:
        budget: the share of the examples to keep, above 0 and at most 1.
    """

    @property
    def budget(self) -> float:
        """See the class."""

    def select(
        self,
        dataset: Sequence[Example],
        model: Checkpoint,
        original: Checkpoint | None,
        budget: float,
        rng: KeyedRNG,
        *,
        progress: Progress,
    ) -> Sequence[int] | Sequence[float]:
        """Return the indices of the selected examples (a `Selection`, to add metadata), or a weight for every example.

        Args:
            dataset: the examples with their `id`: texts with `text` and `input_ids`, pairs with `prompt` and `answer`.
            model: the model to be trained; left unchanged.
            original: the checkpoint before it was compressed, for methods that compare; None if there is none.
            budget: the share of the examples to keep, above 0 and at most 1.
            rng: the source of anything random.
            progress: called as work goes on.
        """
