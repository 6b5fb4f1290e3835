"""`transformers.Trainer` with our loss, our data order and checkpoints that can be trusted.

What it adds to the stock class: the loss of an objective, its parts averaged over the steps between two log lines,
exact resume wherever a log interval was cut, and a stop at the first loss that is not a number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, TrainerState

from intaglio.errors import IntaglioError, did_you_mean
from intaglio.methods.base import Progress
from intaglio.trainer import resume as run_state
from intaglio.trainer.dataset import row_tokens
from intaglio.trainer.fsdp import full_tensor, shard_like
from intaglio.trainer.progress_report import ProgressReport
from intaglio.trainer.protocols import Batch, Example, Loss, Objective, TrainingModifier, TrainingRun
from intaglio.trainer.rng import KeyedRNG
from intaglio.trainer.settings import Settings

WEIGHTS = "model.safetensors"
SHAPERS = "shapers.safetensors"
Evaluate = Callable[[], Mapping[str, float]]


class TrainingModule(nn.Module):
    """Everything that is trained as one module, whose forward is the loss: so that DDP, FSDP and autocast see it all.

    Args:
        run: whose model is trained.
        objective: gives the loss; its own modules are trained too.
        shapers: add to the loss; parameters of their own are trained too.
    """

    accepts_loss_kwargs = False  # read by Trainer

    def __init__(self, run: TrainingRun, objective: Objective, shapers: Sequence[TrainingModifier] = ()) -> None:
        super().__init__()
        self.model = run.checkpoint.model
        self.owned = objective.modules()
        self.groups = [group for shaper in shapers for group in shaper.param_groups()]
        inside = {id(parameter) for parameter in self.parameters()}
        grouped = [parameter for group in self.groups for parameter in group["params"]]
        self.shaped = nn.ParameterList([parameter for parameter in grouped if id(parameter) not in inside])
        self.run, self._objective, self.shapers = run, objective, tuple(shapers)
        # Where FSDP cuts, and what it must not tear apart; it looks for these on what it is given.
        self._no_split_modules = getattr(self.model, "_no_split_modules", None)
        for name in ("get_input_embeddings", "get_output_embeddings", "tie_weights"):
            if hasattr(self.model, name):
                setattr(self, name, getattr(self.model, name))

    def forward(self, batch: Batch, ids: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the total loss and its parts.

        Args:
            batch: from the objective's `collate`.
            ids: of the rows in it, int64 [B]; None: the objective's loss alone.
        """
        loss = self._objective.loss(self.model, batch)
        total, parts = loss.total, dict(loss.parts)
        for shaper in () if ids is None else self.shapers:
            extra = shaper.extra_loss(self.model, {**batch, "id": ids}, loss.outputs)
            if extra is not None:
                total, parts = total + extra.total, {**parts, **extra.parts}
        return total, {name: value.detach() if isinstance(value, Tensor) else value for name, value in parts.items()}

    def train(self, mode: bool = True) -> TrainingModule:
        """Set the mode; nothing to do where it is set already, which Trainer asks before each batch.

        Args:
            mode: True to train, False to evaluate.
        """
        if self.training is not mode or self.model.training is not mode:
            super().train(mode)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, through the optimizer, which knows what is trained without a walk over all modules.

        Args:
            set_to_none: as in torch.
        """
        if self.run.optimizer is None:
            super().zero_grad(set_to_none)
        else:
            self.run.optimizer.zero_grad(set_to_none)

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint of the run holds: trained parameters and buffers, each shared tensor once.

        What is frozen comes from the model that the run began with. Every process of a sharded run must ask.
        """
        kept = set(self.state_dict())
        found: dict[str, Tensor] = {n: p for n, p in self.named_parameters() if p.requires_grad}
        found |= {n: b for n, b in self.named_buffers() if n in kept}
        return {name: full_tensor(value.detach()).contiguous() for name, value in found.items()}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Put back what `saved` gave.

        Args:
            saved: tensors by name.
        """
        here = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, value in saved.items():
            here[name].copy_(shard_like(value, here[name]))


@dataclass
class Collator:
    """The objective's `collate`, with the number of tokens and the weight of the batch beside it.

    Args:
        objective: makes the batch.
        draws: its randomness.
    """

    objective: Objective
    draws: KeyedRNG

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return `{"batch": ..., "ids": ..., "tokens": ..., "weight": ...}`.

        Args:
            examples: rows.
        """
        tokens = sum(map(row_tokens, examples))
        batch = dict(self.objective.collate(examples, self.draws))
        weight = float(batch.pop("weight", len(examples)))
        ids = torch.tensor([example["id"] for example in examples])
        return {"tokens": tokens, "weight": weight, "batch": batch, "ids": ids}


@dataclass
class RunningTotals:
    """What has been added up: since the last log line, and since the run began.

    Args:
        count: micro-batches since the last log line.
        values: sums by name since the last log line; `loss` is the total.
        tokens: of this process since the run began or was resumed.
        tokens_before: of all processes before that.
        seconds_before: of the run before that.
        began: when this process began, by `time.monotonic`.
    """

    count: int = 0
    values: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    tokens_before: int = 0
    seconds_before: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Of the run, over all processes that worked on it one after the other."""
        return self.seconds_before + time.monotonic() - self.began

    def add(self, values: Mapping[str, float]) -> None:
        """Add the values of a micro-batch.

        Args:
            values: by name.
        """
        self.count += 1
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + value


class IntaglioTrainer(Trainer):
    """The one loop; see `intaglio.trainer.train`, which makes and runs it."""

    optimizer: torch.optim.Optimizer | None
    loss_is_scaled_for_ga = False  # ours is a mean over the batch: Trainer divides by the accumulation steps

    def __init__(self, workplace: TrainingModule, settings: Settings, directory: Path | None, **more: Any) -> None:
        super().__init__(model=workplace, **more)
        self.remove_callback(PrinterCallback)
        self.workplace, self.settings, self.directory = workplace, settings, directory
        self.sums = RunningTotals()
        self.evaluation: dict[str, float] = {}
        self.patience = EarlyStopping(settings.patience, settings.watch)
        self._opened = -1
        workplace.run.loss = self._objective_loss

    def _objective_loss(self, batch: Batch) -> Loss:
        with self.compute_loss_context_manager():
            return self.workplace._objective.loss(self.workplace.model, batch)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler | None:
        # The data set of a run is already in order; a stream has no length and takes no sampler.
        return SequentialSampler(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW or SGD; matrices decay, vectors (norms, biases) do not; shapers may have groups of their own."""
        if self.optimizer is None:
            own = {id(p) for group in self.workplace.groups for p in group["params"]}
            trained = [p for p in (model or self.model).parameters() if p.requires_grad and id(p) not in own]
            groups = [
                *self.workplace.groups,
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.settings.weight_decay},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ]
            groups = [group for group in groups if group["params"]]
            rate, chosen = self.settings.learning_rate, self.settings
            if chosen.optimizer == "sgd":
                self.optimizer = torch.optim.SGD(groups, lr=rate, momentum=chosen.momentum, fused=True)
            else:
                self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=chosen.betas, fused=True)
            self.workplace.run.optimizer = self.optimizer
        return self.optimizer

    def get_batch_samples(self, *arguments: Any, **more: Any) -> tuple[list[dict[str, Any]], Any]:
        """The batches of the next optimizer step, each with its share of the step's weight.

        So the loss of a step is the mean over all that is predicted in it, however it is split into batches and
        processes. Trainer divides by the number of batches, and DDP by that of processes: the share undoes both.
        """
        samples, count = super().get_batch_samples(*arguments, **more)
        weights = [sample["weight"] for sample in samples]
        (total,) = self._over_processes([sum(weights)], "sum")
        for sample, weight in zip(samples, weights, strict=True):
            sample["share"] = weight * len(samples) * self.args.world_size / total if total else 0.0
        return samples, count

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the objective's loss and note its parts; stop where it is not finite."""
        step = self.state.global_step + 1
        if step != self._opened:
            self._opened = step
            for shaper in self.workplace.shapers:
                shaper.before_step(step, {**inputs["batch"], "id": inputs["ids"]})
        total, parts = model(inputs["batch"], inputs["ids"])
        names = ["loss", *(f"part/{name}" for name in parts)]
        # One transfer for all: on a GPU each waits for the device.
        values = torch.stack([_scalar(value, total) for value in (total, *parts.values())]).tolist()
        if not math.isfinite(values[0]):
            raise IntaglioError(f"the loss is {values[0]} at step {step}; {self._advice()}")
        self.sums.add({name: value * inputs["share"] for name, value in zip(names, values, strict=True)})
        self.sums.tokens += inputs["tokens"]
        result: Tensor = total * inputs["share"]
        return result

    def _advice(self) -> str:
        saved = [] if self.directory is None else run_state.steps_saved(self.directory)
        lower = "lower the learning rate or clip the gradient harder"
        if not saved or self.directory is None:
            return f"no earlier state is on the disk; {lower}"
        return f"the last good state is {run_state.checkpoint_path(self.directory, saved[-1])}; {lower}"

    def _over_processes(self, values: Sequence[float], how: str) -> list[float]:
        if self.args.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        reduced: list[float] = self.accelerator.reduce(tensor, how).tolist()
        return reduced

    def _means(self) -> dict[str, float]:
        """The sums since the last log line, as means over micro-batches and processes."""
        return self._reduced({name: value / self.sums.count for name, value in self.sums.values.items()})

    def _reduced(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value as its mean over the processes."""
        return dict(zip(values, self._over_processes(list(values.values()), "mean"), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace Trainer's mean, which forgets an interval cut by a resume, by ours, and add the parts."""
        if "loss" in logs:
            logs = {**logs, **self._means(), **self.evaluation}
            self.sums.count, self.sums.values, self.evaluation = 0, {}, {}
            super().log(logs, start_time)

    def total_tokens(self) -> int:
        """Tokens of the run so far, over all processes."""
        return self.sums.tokens_before + int(self._over_processes([float(self.sums.tokens)], "sum")[0])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, the same file however it is spread over processes.

        Args:
            output_dir: where to.
            _internal_call: read by Trainer.
        """
        saved = self.workplace.saved()
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(saved, folder / WEIGHTS)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        broken = [name for name, value in self.workplace.saved().items() if not _finite(value)]
        if broken:
            raise IntaglioError(f"{broken[0]} holds values that are not finite after step {step}; {self._advice()}")
        tensors: dict[str, Tensor] = {}
        state = {
            "count": self.sums.count,
            "values": self._reduced(self.sums.values),
            "tokens": self.total_tokens(),
            "seconds": self.sums.seconds,
            "patience": self.patience.state(),
            "stopped": self.control.should_training_stop,
            "shapers": [run_state.split(shaper.state_dict(), tensors) for shaper in self.workplace.shapers],
        }
        assert self.directory is not None  # nothing is saved without one
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                save_file(tensors, run_state.checkpoint_path(self.directory, step) / SHAPERS)
                run_state.finish(self.directory, step, state)
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise IntaglioError(f"cannot save the state of the run in {self.directory}: {reason}") from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint)
        self.workplace.restore(load_file(path / WEIGHTS))
        state, tensors = run_state.read_state(path), load_file(path / SHAPERS)
        for shaper, kept in zip(self.workplace.shapers, state["shapers"], strict=True):
            shaper.load_state_dict(run_state.join(kept, tensors))
        self.sums.count, self.sums.values = state["count"], dict(state["values"])
        self.sums.tokens_before, self.sums.seconds_before = state["tokens"], state["seconds"]
        self.patience.load(state["patience"])

    def run(self, path: Path | None) -> None:
        """Train to the end, or put back the end of a run that is finished.

        Args:
            path: the whole checkpoint to go on from; None: the beginning.
        """
        if path is not None and run_state.read_state(path)["stopped"]:
            self.state = TrainerState.load_from_json(str(path / "trainer_state.json"))
            self._load_from_checkpoint(str(path))
        else:
            self.train(resume_from_checkpoint=None if path is None else str(path))


@dataclass
class EarlyStopping:
    """When to stop early: after so many evaluations in a row without a new least value.

    Args:
        most: evaluations; None: never.
        watch: the name of the value.
        best: the least value so far.
        waited: evaluations since then.
    """

    most: int | None
    watch: str
    best: float = math.inf
    waited: int = 0

    def is_over(self, values: Mapping[str, float]) -> bool:
        """Take note of an evaluation, and say whether to stop.

        Args:
            values: by name.

        Raises:
            IntaglioError: the watched value is not among them.
        """
        if self.most is None:
            return False
        if self.watch not in values:
            raise IntaglioError(f"watch is {self.watch!r}; {did_you_mean(self.watch, values)}")
        better = values[self.watch] < self.best
        self.best, self.waited = (values[self.watch], 0) if better else (self.best, self.waited + 1)
        return self.waited >= self.most

    def state(self) -> list[Any]:
        """What `load` takes; JSON has no infinity."""
        return [self.best if math.isfinite(self.best) else None, self.waited]

    def load(self, state: Sequence[Any]) -> None:
        """Put back what `state` gave.

        Args:
            state: best and waited.
        """
        self.best, self.waited = math.inf if state[0] is None else state[0], state[1]


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, device=like.device).detach().float()


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


class TrainingCallback(TrainerCallback):
    """After each optimizer step: shapers, evaluation, progress, and a log line at the end.

    Args:
        loop: the loop.
        progress: called after each step.
        evaluate: called at its steps; None: never.
        every: steps between two evaluations; the last step is always evaluated.
        early: writes the early report; None: nothing does.
    """

    def __init__(
        self,
        loop: IntaglioTrainer,
        progress: Progress,
        evaluate: Evaluate | None,
        every: int,
        early: ProgressReport | None = None,
    ) -> None:
        self.loop, self.progress, self.evaluate, self.every, self.early = loop, progress, evaluate, every, early

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """See the class."""
        for shaper in self.loop.workplace.shapers:
            shaper.on_step(state.global_step)
        last = state.global_step >= state.max_steps
        if self.evaluate is not None and (last or state.global_step % self.every == 0):
            values = {name: float(value) for name, value in self.evaluate().items()}
            self.loop.evaluation = {f"evaluation/{name}": value for name, value in values.items()}
            control.should_log = True
            if self.loop.patience.is_over(values):
                control.should_training_stop = True
                control.should_save = self.loop.directory is not None
        control.should_log = control.should_log or last
        sums = self.loop.sums
        loss = sums.values["loss"] / sums.count
        self.progress(state.global_step, state.max_steps, f"train: loss {loss:.3f}")
        return control

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Write the early report."""
        if self.early is not None:
            sums = self.loop.sums
            # Of this process, times their number: an exact sum would have the processes wait for each other.
            tokens = sums.tokens_before + sums.tokens * args.world_size
            self.early.update(state.log_history, state.global_step, state.max_steps, tokens, sums.seconds)
