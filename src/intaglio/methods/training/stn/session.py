"""Sessions of STN: self-tuning training, replay of a schedule, and both as a callback of a stock `Trainer`.

Dimension letters: B examples, H hyperparameters.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import TrainerCallback

from intaglio.errors import IntaglioError
from intaglio.methods.training.stn.hyperparameters import Hyperparameters
from intaglio.methods.training.stn.layers import HypernetInput, gateable, install, remove
from intaglio.methods.training.stn.regularizers import KINDS, Hooks, Regularizer, names_of
from intaglio.trainer.preserve_state import preserve_modes
from intaglio.trainer.protocols import Batch, Loss, ModifierSession, TrainingRun
from intaglio.trainer.rng import generator


class TuningSettings(BaseModel):
    """Settings of self-tuning; see `STN` for their meaning."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    regularizers: list[Regularizer] = Field(default_factory=lambda: [Regularizer(kind="dropout")], min_length=1)
    targets: list[Annotated[str, Field(min_length=1)]] | None = None
    ignore: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.2
    train_steps: Annotated[int, Field(ge=1)] = 2
    valid_steps: Annotated[int, Field(ge=1)] = 1
    hyper_warmup: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = 0.05
    hyper_learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    scale_learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    scale: Annotated[float, Field(gt=0)] = 0.5
    tune_scales: bool = True
    entropy_weight: Annotated[float, Field(ge=0)] = 1e-3
    gate_std: Annotated[float, Field(ge=0)] = 0.01
    schedule: Annotated[str, Field(min_length=1)] | dict[str, list[float]] | None = None


class RegularizedSession(ModifierSession):
    """Base of both sessions: layers and hooks are put into the model, and taken out by `detach`."""

    def __init__(self, method: TuningSettings, run: TrainingRun, gates: bool) -> None:
        self.method, self.run, self.step = method, run, 0
        self.names = names_of(method.regularizers)
        self.device = next(run.model.parameters()).device
        kinds = [KINDS[item.kind] for item in method.regularizers]
        self.hyper = Hyperparameters(
            [kind.transform for kind in kinds],
            [item.first for item in method.regularizers],
            [n for n, kind in enumerate(kinds) if kind.shared],
            method.scale,
            self.device,
        )
        self.state = HypernetInput(self.hyper.h_H.detach()[None])
        layers = gateable(run.model, method.targets, method.ignore)
        draws = generator(run.seed, "stn", "layers")
        self.layers = install(run.model, layers, len(kinds) if gates else 0, self.state, method.gate_std, draws)
        try:
            self.hooks = Hooks(run.model, method.regularizers, self.layers, self.state)
        except IntaglioError:
            remove(run.model, self.layers, None)
            raise

    def before_step(self, step: int, batch: Batch) -> None:
        """Note the step, by which the perturbations are keyed."""
        self.step = step

    def change_batch(self, model: nn.Module, batch: Batch) -> Batch:
        """Set the values of the batch's examples; the batch stays."""
        self.set_examples(batch["id"].tolist())
        return batch

    def set_examples(self, ids: Sequence[int]) -> None:
        """Set the values of examples, by their ids, for the next forward pass in training mode."""
        raise NotImplementedError

    def current(self) -> dict[str, float]:
        """Return the values of the hyperparameters by name, unperturbed."""
        values = self.hyper.values(self.hyper.h_H.detach()[None])[0].tolist()
        return dict(zip(self.names, values, strict=True))

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss:
        """Return the penalties; the parts are the schedule."""
        parts = {f"stn {name}": value for name, value in self.current().items()}
        return Loss(torch.zeros((), device=self.device) + self.hooks.penalty(), parts)

    def after_step(self, step: int) -> None:
        """End the perturbation: what follows sees the unperturbed hyperparameters."""
        self.state.set(self.hyper.h_H.detach()[None])

    def detach(self) -> None:
        """Leave the stock layers, with the weights for the final hyperparameters."""
        self.hooks.remove()
        remove(self.run.model, self.layers, self.hyper.h_H.detach())


class SelfTuning(RegularizedSession):
    """Training of weights and, alternating with it, of the hyperparameters on held-out batches."""

    def __init__(self, method: TuningSettings, run: TrainingRun) -> None:
        super().__init__(method, run, gates=True)
        self.hyper_steps = 0
        warmup = method.hyper_warmup
        self.warmup = warmup if isinstance(warmup, int) else round(warmup * run.steps)
        self.optimizer = torch.optim.Adam(
            [
                {"params": [self.hyper.h_H], "lr": method.hyper_learning_rate},
                {"params": [self.hyper.s_H], "lr": method.scale_learning_rate},
            ]
        )

    def _noise(self, ids: Sequence[int], *key: int | str) -> Tensor:
        """Draw noise [B, H]: that of shared hyperparameters by the step, all other by step and example."""
        shared, width = self.hyper.shared, len(self.names)
        rows = [torch.randn(width, generator=generator(self.run.seed, "stn", *key, n)) for n in ids]
        noise_BH = torch.stack(rows)
        if shared:  # row 0 would depend on how a step is split into batches and processes
            noise_BH[:, shared] = torch.randn(width, generator=generator(self.run.seed, "stn", *key, "all"))[shared]
        return noise_BH.to(self.device)

    def set_examples(self, ids: Sequence[int]) -> None:
        """Perturb the hyperparameters for examples, by their ids."""
        h_BH = self.hyper.perturbed(self._noise(ids, "train", self.step)).detach()
        self.state.set(h_BH, self.hyper.values(h_BH))

    def after_step(self, step: int) -> None:
        """Take the hyper steps that follow an optimizer step."""
        since = step - self.warmup
        if since > 0 and since % self.method.train_steps == 0:
            for _ in range(self.method.valid_steps):
                self.hyper_step()
        super().after_step(step)

    def hyper_step(self) -> float:
        """Take a step of the hyperparameters on the next held-out batch, and return the loss, the entropy excluded.

        The model is in evaluation mode and nothing is regularized: the gradient reaches h through the gates alone.
        """
        assert self.run.held_out is not None  # checked by `attach`
        batch = self.run.held_out(self.hyper_steps)
        count = _rows(batch.values())
        tuned, h_1H = self.method.tune_scales, self.hyper.h_H[None]
        noise = self._noise(range(count), "hyper", self.hyper_steps) if tuned else None
        inputs = [self.hyper.h_H, self.hyper.s_H] if tuned else [self.hyper.h_H]
        with preserve_modes(self.run.model), torch.enable_grad():
            self.run.model.eval()
            self.state.set(h_1H if noise is None else self.hyper.perturbed(noise))
            loss = self.run.loss(batch).total
            objective = loss - self.method.entropy_weight * self.hyper.entropy() if tuned else loss
            gradients = torch.autograd.grad(objective, inputs)
        for parameter, gradient in zip(inputs, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.hyper_steps += 1
        self.state.set(self.hyper.h_H.detach()[None])
        return float(loss.detach())

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss:
        """Return the penalties; the parts are the schedule and the scales."""
        loss = super().extra_loss(model, batch, outputs)
        if not self.method.tune_scales:
            return loss
        scales = zip(self.names, self.hyper.sigma_H.detach().tolist(), strict=True)
        return Loss(loss.total, {**loss.parts, **{f"stn scale of {name}": value for name, value in scales}})

    def report(self) -> dict[str, Any]:
        """Return a table of the hyperparameters: start, end and the scale of the last perturbations."""
        starts = [f"{item.first:.4g}" for item in self.method.regularizers]
        ends = [f"{value:.4g}" for value in self.current().values()]
        scales = [f"{value:.3g}" for value in self.hyper.sigma_H.tolist()]
        rows = [list(row) for row in zip(self.names, starts, ends, scales, strict=True)]
        headings = ["hyperparameter", "start", "end", "scale"]
        return {"tables": [{"title": "Hyperparameters tuned by stn", "headings": headings, "rows": rows}]}

    def state_dict(self) -> dict[str, Any]:
        """Return hyperparameters, scales, the moments of their optimizer and the number of hyper steps."""
        tensors = {"h": self.hyper.h_H, "s": self.hyper.s_H}
        moments = {name: dict(self.optimizer.state.get(value, {})) for name, value in tensors.items()}
        return {**tensors, "moments": moments, "hyper_steps": self.hyper_steps}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.hyper_steps = state["hyper_steps"]
        for name, value in (("h", self.hyper.h_H), ("s", self.hyper.s_H)):
            value.copy_(state[name])
            if state["moments"][name]:
                self.optimizer.state[value] = {
                    key: moment.to(self.device) if key != "step" else moment
                    for key, moment in state["moments"][name].items()
                }
        self.state.set(self.hyper.h_H.detach()[None])


def _rows(values: Iterable[Any]) -> int:
    """Return the number of examples of a batch, the length of its first tensor."""
    return next(len(value) for value in values if isinstance(value, Tensor) and value.ndim)


class Replay(RegularizedSession):
    """Training of a plain network under the values of a schedule."""

    def __init__(self, method: TuningSettings, run: TrainingRun, schedule: Mapping[str, Sequence[float]]) -> None:
        super().__init__(method, run, gates=False)
        self.steps = list(schedule["step"])
        self.rows = torch.tensor([schedule[name] for name in self.names], device=self.device).T

    def _row(self) -> Tensor:
        # A line of a history holds means over the steps since the line before.
        return self.rows[min(bisect_left(self.steps, self.step), len(self.rows) - 1)]

    def set_examples(self, ids: Sequence[int]) -> None:
        """Set the values of the schedule at this step."""
        self.state.set(self.state.h_BH, self._row()[None])

    def current(self) -> dict[str, float]:
        """Return the values of the schedule at this step by name."""
        return dict(zip(self.names, self._row().tolist(), strict=True))


class STNCallback(TrainerCallback):
    """Runs STN in a stock `Trainer`; made by `STN.callback`.

    The penalties are added to the model's own loss. After training, `detach` leaves the stock model.
    """

    def __init__(self, session: RegularizedSession) -> None:
        self.session = session
        model, self._passes = session.run.model, 0
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after),
        ]

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training:
            rows = _rows((*args, *kwargs.values()))
            self.session.set_examples(range(self._passes, self._passes + rows))
            self._passes += rows

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if model.training:
            output["loss"] = output["loss"] + self.session.hooks.penalty()
        return output

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Begin an optimizer step."""
        self._passes = 0
        self.session.before_step(state.global_step + 1, {})

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Follow up an optimizer step."""
        self.session.after_step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        """Add the current values to the log."""
        values = {f"stn {name}": value for name, value in self.session.current().items()}
        for line in (logs, state.log_history[-1] if state.log_history else None):
            if line is not None:
                line |= values

    def detach(self) -> None:
        """Leave the stock model, with the weights for the final hyperparameters."""
        for handle in self._handles:
            handle.remove()
        self.session.detach()
