"""`transformers.Trainer` with the loss of an objective, keyed data order and exact resume.

It also averages the parts of the loss between two log lines, resumes exactly within a log interval, and stops at the
first loss that is not finite.
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

from intaglio.errors import DivergedError, IntaglioError, did_you_mean
from intaglio.methods.base import Progress
from intaglio.trainer import resume as run_state
from intaglio.trainer.dataset import row_tokens
from intaglio.trainer.fsdp import full_tensor, shard_like
from intaglio.trainer.modified_loss import modified_loss
from intaglio.trainer.progress_report import ProgressReport
from intaglio.trainer.protocols import Batch, Example, Loss, ModifierSession, Objective, TrainingRun
from intaglio.trainer.rng import EVALUATION, KeyedRNG, generator
from intaglio.trainer.settings import Settings

WEIGHTS = "model.safetensors"
MODIFIERS = "modifiers.safetensors"
Evaluate = Callable[[], Mapping[str, float]]


class TrainingModule(nn.Module):
    """Model, objective and modifiers as one module whose forward is the loss, so that DDP, FSDP and autocast see it."""

    accepts_loss_kwargs = False  # read by Trainer

    def __init__(self, run: TrainingRun, objective: Objective, sessions: Sequence[ModifierSession] = ()) -> None:
        super().__init__()
        self.model = run.model
        self.owned = objective.modules()
        self.groups = [group for session in sessions for group in session.param_groups()]
        inside = {id(parameter) for parameter in self.parameters()}
        grouped = [parameter for group in self.groups for parameter in group["params"]]
        self.modifier_parameters = nn.ParameterList([parameter for parameter in grouped if id(parameter) not in inside])
        self.run, self.objective, self.sessions = run, objective, tuple(sessions)
        # Where FSDP cuts, and what it must not tear apart; it looks for these on what it is given.
        self._no_split_modules = getattr(self.model, "_no_split_modules", None)
        for name in ("get_input_embeddings", "get_output_embeddings", "tie_weights"):
            if hasattr(self.model, name):
                setattr(self, name, getattr(self.model, name))

    def forward(self, batch: Batch, ids: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the total loss and its parts; without ids, those of the objective alone."""
        loss = modified_loss(self.objective, self.model, batch, ids, () if ids is None else self.sessions)
        parts = {name: value.detach() if isinstance(value, Tensor) else value for name, value in loss.parts.items()}
        return loss.total, parts

    def train(self, mode: bool = True) -> TrainingModule:
        """Set the mode, at no cost where it is set already: Trainer calls this before each batch."""
        if self.training is not mode or self.model.training is not mode:
            super().train(mode)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients through the optimizer, without a walk over all modules."""
        if self.run.optimizer is None:
            super().zero_grad(set_to_none)
        else:
            self.run.optimizer.zero_grad(set_to_none)

    def saved(self) -> dict[str, Tensor]:
        """Return trained parameters and persistent buffers, each shared tensor once.

        Frozen weights come from the model that the run began with. Every process of a sharded run must call this.
        """
        persistent = set(self.state_dict())
        tensors: dict[str, Tensor] = {n: p for n, p in self.named_parameters() if p.requires_grad}
        tensors |= {n: b for n, b in self.named_buffers() if n in persistent}
        return {name: full_tensor(value.detach()).contiguous() for name, value in tensors.items()}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Restore the tensors of `saved`."""
        here = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, value in saved.items():
            here[name].copy_(shard_like(value, here[name]))


@dataclass
class Collator:
    """The objective's `collate`, with the number of tokens and the weight of the batch."""

    objective: Objective
    rng: KeyedRNG

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return `{"batch": ..., "ids": ..., "tokens": ..., "weight": ...}`."""
        tokens = sum(map(row_tokens, examples))
        batch = dict(self.objective.collate(examples, self.rng))
        weight = float(batch.pop("weight", len(examples)))
        ids = torch.tensor([example["id"] for example in examples])
        return {"tokens": tokens, "weight": weight, "batch": batch, "ids": ids}


def moved(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@dataclass(frozen=True)
class HeldOutBatches:
    """Batches of rows that are held out from training, each pass in an order of its own."""

    rows: Sequence[Example]
    objective: Objective
    seed: int
    size: int
    device: torch.device

    def __call__(self, number: int) -> Batch:
        """Return a batch by its number, from 0."""
        passed, place = divmod(number, -(-len(self.rows) // self.size))
        order = torch.randperm(len(self.rows), generator=generator(self.seed, "held out", passed)).tolist()
        chosen = order[place * self.size : (place + 1) * self.size]
        examples = [{**self.rows[n], "id": n, "epoch": EVALUATION, "step": 0} for n in chosen]
        made: Batch = Collator(self.objective, KeyedRNG(self.seed, training=False))(examples)["batch"]
        return moved(made, self.device)


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of an optimizer that decays matrices, and no vectors (norms, biases); none is empty."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@dataclass
class RunningTotals:
    """Running totals since the last log line (`count` micro-batches, `values`) and since the run began or resumed."""

    count: int = 0
    values: dict[str, float] = field(default_factory=dict)
    tokens: int = 0  # of this process
    tokens_before: int = 0  # before the resume, of all processes
    seconds_before: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds of the run, time before a resume included."""
        return self.seconds_before + time.monotonic() - self.began

    def add(self, values: Mapping[str, float]) -> None:
        """Add the values of a micro-batch."""
        self.count += 1
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + value


class IntaglioTrainer(Trainer):
    """The training loop; `intaglio.trainer.train` builds and runs it."""

    optimizer: torch.optim.Optimizer | None
    loss_is_scaled_for_ga = False  # ours is a mean over the batch: Trainer divides by the accumulation steps

    def __init__(self, module: TrainingModule, settings: Settings, directory: Path | None, **more: Any) -> None:
        super().__init__(model=module, **more)
        self.remove_callback(PrinterCallback)
        self.module, self.settings, self.directory = module, settings, directory
        self.totals = RunningTotals()
        self.evaluation: dict[str, float] = {}
        self.early_stopping = EarlyStopping(settings.early_stopping_patience, settings.metric_for_best_model)
        self._started_step = -1
        module.run.loss = self._objective_loss

    def _objective_loss(self, batch: Batch, model: nn.Module | None = None) -> Loss:
        with self.compute_loss_context_manager():
            return self.module.objective.loss(self.module.model if model is None else model, batch)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler | None:
        # The data set of a run is already in order; a stream has no length and takes no sampler.
        return SequentialSampler(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW or SGD: matrices decay, vectors (norms, biases) do not; modifiers may have groups of their own."""
        if self.optimizer is None:
            own = {id(p) for group in self.module.groups for p in group["params"]}
            rate = self.settings.learning_rate
            # Rates of the objective's own modules.
            rates = {
                id(parameter): rate * ratio
                for name, ratio in getattr(self.module.objective, "lr_ratios", {}).items()
                for parameter in self.module.owned[name].parameters()
            }
            trained = [p for p in (model or self.model).parameters() if p.requires_grad and id(p) not in own]
            groups = list(self.module.groups)
            for lr in dict.fromkeys([rate, *rates.values()]):
                part = [p for p in trained if rates.get(id(p), rate) == lr]
                groups += [{**group, "lr": lr} for group in decay_groups(part, self.settings.weight_decay)]
            if self.settings.optimizer == "sgd":
                self.optimizer = torch.optim.SGD(groups, lr=rate, momentum=self.settings.momentum, fused=True)
            else:
                self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=self.settings.betas, fused=True)
            self.module.run.optimizer = self.optimizer
        return self.optimizer

    def get_batch_samples(self, *arguments: Any, **more: Any) -> tuple[list[dict[str, Any]], Any]:
        """Return the batches of the next optimizer step, each with its share of the step's weight.

        So the loss of a step is the mean over all of its targets, however they are split into batches and processes.
        Trainer divides by the number of batches, and DDP by the number of processes: the share undoes both.
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
        """Return the objective's loss and add up its parts; raise where it is not finite."""
        step = self.state.global_step + 1
        if step != self._started_step:
            self._started_step = step
            for session in self.module.sessions:
                session.before_step(step, {**inputs["batch"], "id": inputs["ids"]})
        total, parts = model(inputs["batch"], inputs["ids"])
        names = ["loss", *(f"part/{name}" for name in parts)]
        # One transfer for all: on a GPU each waits for the device.
        values = torch.stack([_scalar(value, total) for value in (total, *parts.values())]).tolist()
        if not math.isfinite(values[0]):
            raise DivergedError(f"the loss is {values[0]} at step {step}; {self._advice()}")
        self.totals.add({name: value * inputs["share"] for name, value in zip(names, values, strict=True)})
        self.totals.tokens += inputs["tokens"]
        result: Tensor = total * inputs["share"]
        return result

    def _advice(self) -> str:
        saved = [] if self.directory is None else run_state.steps_saved(self.directory)
        lower = "lower the learning rate or clip the gradient harder"
        if not saved or self.directory is None:
            return f"no earlier state was saved; {lower}"
        return f"the last good state is {run_state.checkpoint_path(self.directory, saved[-1])}; {lower}"

    def _over_processes(self, values: Sequence[float], how: str) -> list[float]:
        if self.args.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        reduced: list[float] = self.accelerator.reduce(tensor, how).tolist()
        return reduced

    def means(self) -> dict[str, float]:
        """Return means over micro-batches and processes since the last log line."""
        return self._reduced({name: value / self.totals.count for name, value in self.totals.values.items()})

    def _reduced(self, values: Mapping[str, float]) -> dict[str, float]:
        return dict(zip(values, self._over_processes(list(values.values()), "mean"), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log exact means (Trainer's own forget an interval cut by a resume), with the parts of the loss."""
        if "loss" in logs:
            logs = {**logs, **self.means(), **self.evaluation}
            self.totals.count, self.totals.values, self.evaluation = 0, {}, {}
            super().log(logs, start_time)

    def total_tokens(self) -> int:
        """Return the tokens of the run so far, over all processes."""
        return self.totals.tokens_before + int(self._over_processes([float(self.totals.tokens)], "sum")[0])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained tensors, in the same file however they are sharded."""
        saved = self.module.saved()
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(saved, folder / WEIGHTS)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        broken = [name for name, value in self.module.saved().items() if not _finite(value)]
        if broken:
            raise DivergedError(f"{broken[0]} holds values that are not finite after step {step}; {self._advice()}")
        tensors: dict[str, Tensor] = {}
        state = {
            "count": self.totals.count,
            "values": self._reduced(self.totals.values),
            "tokens": self.total_tokens(),
            "seconds": self.totals.seconds,
            "early_stopping": self.early_stopping.state(),
            "stopped": self.control.should_training_stop,
            "modifiers": [run_state.split(session.state_dict(), tensors) for session in self.module.sessions],
        }
        assert self.directory is not None  # nothing is saved without one
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                save_file(tensors, run_state.checkpoint_path(self.directory, step) / MODIFIERS)
                run_state.finish(self.directory, step, state)
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise IntaglioError(f"cannot save the state of the run in {self.directory}: {reason}") from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint)
        self.module.restore(load_file(path / WEIGHTS))
        state, tensors = run_state.read_state(path), load_file(path / MODIFIERS)
        for session, saved in zip(self.module.sessions, state["modifiers"], strict=True):
            session.load_state_dict(run_state.join(saved, tensors))
        self.totals.count, self.totals.values = state["count"], dict(state["values"])
        self.totals.tokens_before, self.totals.seconds_before = state["tokens"], state["seconds"]
        self.early_stopping.load(state["early_stopping"])

    def run(self, path: Path | None) -> None:
        """Train from a saved step (None: from the start) to the end, or restore a run that had finished."""
        if path is not None and run_state.read_state(path)["stopped"]:
            self.state = TrainerState.load_from_json(str(path / "trainer_state.json"))
            self._load_from_checkpoint(str(path))
        else:
            self.train(resume_from_checkpoint=None if path is None else str(path))


@dataclass
class EarlyStopping:
    """Early stopping after `patience` evaluations in a row without a new minimum of a metric; None: never."""

    patience: int | None
    metric: str
    best: float = math.inf
    waited: int = 0

    def update(self, values: Mapping[str, float]) -> bool:
        """Record an evaluation, and return whether to stop."""
        if self.patience is None:
            return False
        if self.metric not in values:
            raise IntaglioError(f"metric_for_best_model is {self.metric!r}; {did_you_mean(self.metric, values)}")
        better = values[self.metric] < self.best
        self.best, self.waited = (values[self.metric], 0) if better else (self.best, self.waited + 1)
        return self.waited >= self.patience

    def state(self) -> list[Any]:
        """Return the state for `load`; JSON has no infinity."""
        return [self.best if math.isfinite(self.best) else None, self.waited]

    def load(self, state: Sequence[Any]) -> None:
        """Restore a state."""
        self.best, self.waited = math.inf if state[0] is None else state[0], state[1]


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, device=like.device).detach().float()


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


class TrainingCallback(TrainerCallback):
    """Runs modifiers, evaluation, progress and logging after each optimizer step."""

    def __init__(
        self,
        loop: IntaglioTrainer,
        progress: Progress,
        evaluate: Evaluate | None,
        evaluate_every: int,
        report: ProgressReport | None = None,
    ) -> None:
        self.loop, self.progress, self.report = loop, progress, report
        self.evaluate, self.evaluate_every = evaluate, evaluate_every

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """Follow up a step; the last one is always evaluated and logged."""
        step = state.global_step
        for session in self.loop.module.sessions:
            session.after_step(step)
        limit = self.loop.settings.stop_at_loss
        reached = limit is not None and control.should_log and self.loop.means()["loss"] <= limit
        last = reached or step >= state.max_steps
        if self.evaluate is not None and (last or step % self.evaluate_every == 0):
            values = {name: float(value) for name, value in self.evaluate().items()}
            self.loop.evaluation = {f"evaluation/{name}": value for name, value in values.items()}
            control.should_log = True
            reached = self.loop.early_stopping.update(values) or reached
        if reached:
            control.should_training_stop = True
            control.should_save = self.loop.directory is not None
        control.should_log = control.should_log or last
        totals = self.loop.totals
        self.progress(step, state.max_steps, f"train: loss {totals.values['loss'] / totals.count:.3f}")
        return control

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Write the progress page."""
        if self.report is not None:
            totals = self.loop.totals
            # Tokens of this process times their number: an exact sum would make the processes wait for each other.
            tokens = totals.tokens_before + totals.tokens * args.world_size
            self.report.update(state.log_history, state.global_step, state.max_steps, tokens, totals.seconds)
