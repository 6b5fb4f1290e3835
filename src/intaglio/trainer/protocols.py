"""What the loop trains with: an objective, shapers, a selector.

Objectives are data plus loss plus what they own. They are told nothing of the optimizer, of devices or of resuming, so
one works with any model that its loss fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from intaglio.checkpoint import Checkpoint
    from intaglio.methods.base import Cost, Progress, Workload
    from intaglio.trainer.rng import KeyedRNG

Example = dict[str, Any]
"""One training example. The loop adds `id` (its place in the data), `epoch` and `step` (the optimizer's, from 0)."""

Batch = dict[str, Any]
"""What an objective makes of some examples: tensors by name, moved to the model's device by the loop.

`weight`, a number, is taken out by the loop: how much the batch counts beside the others of its optimizer step, such as
the number of tokens that are predicted. Without it, batches count by their rows."""


@dataclass(frozen=True)
class Loss:
    """What an objective says about one batch, or a shaper adds to it.

    Args:
        total: the scalar that is minimised, a mean over the batch.
        parts: named scalars that are logged beside it; they need no gradient, and may be plain numbers.
        outputs: the model's outputs, for shapers that look at them.
    """

    total: Tensor
    parts: Mapping[str, Tensor | float] = field(default_factory=dict)
    outputs: Any = None


@dataclass
class TrainingRun:
    """What a shaper may know of the run that it shapes.

    Args:
        checkpoint: what is trained. A shaper that leaves a live part behind notes it here.
        steps: optimizer steps of the whole run, from which schedules are reckoned.
        rows: rows of the data, whose ids are 0 to rows - 1; None for a stream.
        seed: of the run.
        loss: `loss(batch)`, the objective's loss of a batch with its gradient, in the run's precision and without what
            shapers add: for a shaper that takes steps of its own.
        accumulate: batches of an optimizer step, whose gradients are averaged. Default 1.
        optimizer: the loop's; None until every shaper is attached. Its groups may be changed in `before_step`.
    """

    checkpoint: Checkpoint
    steps: int
    rows: int | None
    seed: int
    loss: Callable[[Batch], Loss]
    accumulate: int = 1
    optimizer: torch.optim.Optimizer | None = None


@runtime_checkable
class Objective(Protocol):
    """What the model must predict."""

    def modules(self) -> nn.ModuleDict:
        """Modules that the objective owns; they are trained and saved with the model. Empty for most."""

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Make a batch of examples.

        Args:
            examples: rows, each with its `id`, `epoch` and `step`.
            rng: `rng(example)` is the example's own `torch.Generator`; anything random is drawn from it, so that
                resuming, another split into batches and several processes give the same data. `rng.training` is False
                while evaluating.
        """

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of a batch.

        Args:
            model: the model in training mode (in evaluation mode while evaluating).
            batch: what `collate` made, on the model's device.
        """


@runtime_checkable
class Prepares(Protocol):
    """An objective that makes its rows out of the user's examples once, before the loop: packing, instruction pairs."""

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Return the rows to train on, lazily where the examples are a stream.

        Args:
            checkpoint: what is trained; its vocabulary may be made larger here.
            examples: the user's examples with their `id`, texts already tokenised.
            rng: draws that stay the same over epochs.
        """


@runtime_checkable
class TrainingModifier(Protocol):
    """What shapes training from beside: schedules, regularizers, masks and quantizers while training.

    A class that says `trains_weights = True` is refused beside adapters or frozen weights, before a model loads.

    Every process of a run has the same state: what a shaper learns from a batch, it learns from those of all processes.
    """

    def attach(self, run: TrainingRun) -> None:
        """Get ready, before the optimizer is made; a resumed run attaches anew and then loads the state."""

    def on_step(self, t: int) -> None:
        """Called after optimizer step `t` (from 1)."""

    def before_step(self, t: int, next_batch: Batch) -> None:
        """Called before the first forward of optimizer step `t` (from 1), with the batch it begins with."""

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss | None:
        """What is added to the objective's loss of a batch, or None; never called while evaluating.

        Args:
            model: the model.
            batch: the objective's, and `id`, int64 [B]: which rows are in it.
            outputs: the objective's, see `Loss`.
        """

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters with settings of their own, as `torch.optim` takes them; empty for none."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs and that the model does not hold: tensors and plain data."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave, after `attach`."""

    def detach(self, run: TrainingRun) -> None:
        """Bake the result into plain tensors and leave the model stock, or note in the record what stays live."""


@runtime_checkable
class HasTrainingCost(Protocol):
    """A shaper or selector that makes training dearer by an amount worth saying: passes, selections, memory."""

    def training_cost(self, workload: Workload, steps: float, batch_tokens: int, pass_flops: float) -> Cost:
        """What it takes beside the steps themselves.

        Args:
            workload: of the model.
            steps: optimizer steps.
            batch_tokens: of a batch.
            pass_flops: operations of a forward and backward of the batch that a step begins with.
        """


@dataclass(frozen=True, eq=False)
class Selection(Sequence[int]):
    """Chosen examples, with what is told of the choice.

    Args:
        indices: of the examples.
        told: plain data for the record and the report; what is named `bars` is drawn (see `report.document`), and
            `seconds`, of its parts by name, are for the report alone.
    """

    indices: Sequence[int]
    told: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, place: Any) -> Any:
        """The index at a place, or the indices of a slice."""
        return self.indices[place]

    def __len__(self) -> int:
        """How many were chosen."""
        return len(self.indices)


@runtime_checkable
class Selector(Protocol):
    """Which examples are trained on.

    One that says `compares = False`, as an attribute or property, needs no original, and none is loaded for it.

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
        """Return the indices of the chosen examples (a `Selection`, to tell of them), or a weight for every example.

        Args:
            dataset: the examples with their `id`: texts with `text` and `input_ids`, pairs with `prompt` and `answer`.
            model: what will be trained; left as it is.
            original: the checkpoint before it was carved, where a method compares; None if there is none.
            budget: the share of the examples to keep, above 0 and at most 1.
            rng: the source of anything random.
            progress: called as work goes on.
        """
