"""What the loop trains with: an objective, shapers, a selector.

Objectives are data plus loss plus what they own. They are told nothing of the optimizer, of devices or of resuming, so
one works with any model that its loss fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from intaglio.checkpoint import Checkpoint
    from intaglio.trainer.draws import Draws

Example = dict[str, Any]
"""One training example. The loop adds `id` (its place in the data), `epoch` and `step` (the optimizer's, from 0)."""

Batch = dict[str, Any]
"""What an objective makes of some examples: tensors by name, moved to the model's device by the loop.

`weight`, a number, is taken out by the loop: how much the batch counts beside the others of its optimizer step, such as
the number of tokens that are predicted. Without it, batches count by their rows."""


@dataclass(frozen=True)
class Loss:
    """What an objective says about one batch.

    Args:
        total: the scalar that is minimised, a mean over the batch.
        parts: named scalars that are logged beside it; they need no gradient.
        outputs: the model's outputs, for shapers that look at them.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Any = None


@runtime_checkable
class Objective(Protocol):
    """What the model must predict."""

    def modules(self) -> nn.ModuleDict:
        """Modules that the objective owns; they are trained and saved with the model. Empty for most."""

    def collate(self, examples: Sequence[Example], rng: Draws) -> Batch:
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

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: Draws) -> Iterable[Example]:
        """Return the rows to train on, lazily where the examples are a stream; each has `input_ids`.

        Args:
            checkpoint: what is trained; its vocabulary may be made larger here.
            examples: the user's examples with their `id`, texts already tokenised.
            rng: draws that stay the same over epochs.
        """


@runtime_checkable
class Shaper(Protocol):
    """What shapes training from beside: schedules, regularizers, masks and quantizers while training."""

    def attach(self, model: nn.Module) -> None:
        """Get ready on a model, before the optimizer is made."""

    def on_step(self, t: int) -> None:
        """Called after optimizer step `t` (from 1)."""

    def before_step(self, t: int, next_batch: Batch) -> None:
        """Called before the first forward of optimizer step `t` (from 1), with the batch it begins with."""

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Mapping[str, Tensor]:
        """Named scalars that are added to the loss and logged; empty for none."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters with settings of their own, as `torch.optim` takes them; empty for none."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs and that is no parameter of the model: tensors and plain data."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""

    def detach(self, model: nn.Module) -> None:
        """Bake the result into plain tensors and leave the model stock."""


@runtime_checkable
class Selector(Protocol):
    """Which examples are trained on.

    Args:
        budget: the share of the examples to keep, above 0 and at most 1.
    """

    @property
    def budget(self) -> float:
        """See the class."""

    def select(
        self, dataset: Sequence[Example], model: Checkpoint, original: Checkpoint | None, budget: float
    ) -> Sequence[int] | Sequence[float]:
        """Return the indices of the chosen examples, or a weight (a float) for every example.

        Args:
            dataset: the examples.
            model: what will be trained.
            original: the checkpoint before it was carved, where a method compares; None if there is none.
            budget: the share of the examples to keep, above 0 and at most 1.
        """
