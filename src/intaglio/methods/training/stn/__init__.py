"""STN (MacKay et al. 2019): a network gated by its hyperparameters tunes its own regularization while it trains.

- here: `STN`, a training modifier, and `found_schedule`.
- `hyperparameters`: transforms and perturbations.
- `layers`: gated linear layers, convolutions, embeddings and LSTMs.
- `regularizers`: dropouts, penalties and image changes with a strength for each example.
- `session`: the alternation of train and hyper steps, the replay of a schedule, a callback for a stock `Trainer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import model_validator
from torch import nn

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.record import read_record
from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Workload
from intaglio.methods.training.stn.hyperparameters import Hyperparameters, Transform
from intaglio.methods.training.stn.layers import GatedLayer, GatedLSTM
from intaglio.methods.training.stn.regularizers import KINDS, Regularizer, names_of
from intaglio.methods.training.stn.session import Replay, SelfTuning, STNCallback, TuningSettings
from intaglio.trainer.protocols import Batch, Loss, ModifierSession, TrainingRun

__all__ = ["STN", "GatedLSTM", "GatedLayer", "Hyperparameters", "Regularizer", "Transform", "found_schedule"]

PART = "part/stn "
"""Prefix of the schedule's columns in a recorded curve."""
STEP = "step"


class STN(TuningSettings, Method, slug="stn"):
    """Tune regularization by gradients from held-out data while a network trains: a training modifier for any model.

        w(h) = e0 W_e + (U h) W_h row by row,    r_j = transform_j(h_j)
        train step:  h~ = h + sigma eps for every example;  w, U step on  L_train(w(h~), r(h~))
        hyper step:  h, sigma step on  L_valid(w(h~)) - tau sum_j log(sigma_j sqrt(2 pi e))

    e0 starts at 1 and W_e as the layer's weight; U and W_h are trained for the response to h. w(h) approximates the
    best weights for hyperparameters near h, so that the held-out loss has a gradient in h, even for hyperparameters in
    which the training loss has none, such as dropout rates. Hyper steps take the model in evaluation mode and change h
    and sigma alone. At the end the gates are removed and the weights for the final h stay in the stock layers: no
    retraining is needed. The values of r over the steps are a schedule, drawn in the report, that `schedule` replays on
    a plain network. A step costs about twice a plain step, and the gated weights twice their memory; learning rates
    cannot be tuned so.

    In a recipe, where the report's own held-out texts stay out of the tuning:
    `train: {modifiers: [{stn: {regularizers: [{kind: dropout}]}}], steps: 500}`. In a stock `Trainer`:

        tuner = intaglio.STN(hyper_warmup=10).callback(model, held_out_batches)
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[tuner])
        trainer.train()
        tuner.detach()
        model.save_pretrained("tuned")

    `held_out_batches` are dicts of tensors with labels, as the model takes them. Batches have their examples first.

    Departures from the authors' code: `cutout_length` and `cutout_holes` reach the top of their ranges, discrete
    hyperparameters start in the middle of an interval, perturbations that a batch shares are keyed by the step instead
    of taken from its first row, dropouts of inputs and of LSTMs end at 0.9 instead of 1, embeddings and LSTMs have e0
    as other layers do, and hyper steps leave out the activation penalties that the LSTM code keeps.

    Args:
        regularizers: hyperparameters to tune; see `Regularizer`. Default: dropout on the inputs of all gated layers.
        targets: layers to gate, by name or shell pattern: linear layers, convolutions, embeddings and LSTMs. Default:
            those in the blocks of a transformer, or all of any other module.
        ignore: layers that are not gated. Default: none.
        validation: share of the training rows that the hyperparameters are tuned on, and the weights not. Default 0.2.
        train_steps: train steps between hyper steps. Default 2.
        valid_steps: hyper steps in a row. Default 1.
        hyper_warmup: train steps (a whole number) or share of all steps (below 1) before the first hyper step. Default
            0.05; the authors' is 5 epochs, or one for LSTMs.
        hyper_learning_rate: of h, under Adam. Default 3e-3; the authors' LSTM has 0.01.
        scale_learning_rate: of the scales, under Adam. Default 3e-3.
        scale: initial standard deviation sigma of the perturbations. Default 0.5; the authors' LSTM has 1.
        tune_scales: whether sigma is tuned; otherwise hyper steps see h unperturbed, as in the authors' LSTM. Default
            true.
        entropy_weight: tau, which keeps sigma from vanishing. Default 1e-3, that of the authors' command (their flag
            has 1e-5).
        gate_std: standard deviation of the initial U; 0: the network begins as the stock one. Default 0.01.
        schedule: instead of tuning, replay a schedule: columns `{step: [...], NAME: [...]}` with a name for each
            regularizer, or a directory of a model that was trained with stn. Default: none.

    Raises:
        IntaglioError: (when a run begins) a pattern names no layer, a layer shares its weight, a start lies outside its
            range, a regularizer does not fit its modules, or nothing can be held out.

    Source: MacKay et al., Self-Tuning Networks: Bilevel Optimization of Hyperparameters using Structured Best-Response
    Functions, ICLR 2019; code asteroidhouse/self-tuning-networks.
    """

    kinds = ("modifier",)
    summary = "tunes dropout, penalties and augmentation by gradients from held-out data while a network trains"
    citation = (
        "MacKay et al., Self-Tuning Networks: Bilevel Optimization of Hyperparameters using Structured Best-Response "
        "Functions, ICLR 2019"
    )
    url = "https://arxiv.org/abs/1903.03088"

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"linear_weights"})
    invalidates: ClassVar[frozenset[Capability]] = frozenset({"zeros"})

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = names_of(self.regularizers)
        twice = next((name for name in names if names.count(name) > 1 or name == STEP), None)
        if twice is not None:
            raise ValueError(f"regularizers holds the name {twice!r}, which must be that of one regularizer alone")
        for item in self.regularizers:
            try:
                KINDS[item.kind].transform.inverse(item.first)
            except IntaglioError as error:
                raise ValueError(f"regularizers: {item.kind}: {error}") from None
        if isinstance(self.schedule, dict):
            try:
                _check_schedule(self.schedule, names)
            except IntaglioError as error:
                raise ValueError(str(error)) from None
        return self

    @classmethod
    def lstm(cls, **overrides: Any) -> Self:
        """Return the settings of the authors' LSTM: sigma of 1, not tuned, and a rate of 0.01.

        Args:
            overrides: fields that the caller sets.
        """
        return cls(**{"scale": 1.0, "tune_scales": False, "hyper_learning_rate": 0.01, **overrides})

    @property
    def held_out_share(self) -> float:
        """Share of the rows that the loop holds out for the hyper steps; none under a schedule."""
        return 0.0 if self.schedule is not None else self.validation

    def attach(self, run: TrainingRun) -> ModifierSession:
        """Gate the layers, or set up the replay of a schedule."""
        if self.schedule is None:
            if run.held_out is None:
                raise IntaglioError("stn needs held-out batches to tune on; in a stock Trainer use STN.callback")
            return SelfTuning(self, run)
        schedule = self.schedule if isinstance(self.schedule, dict) else found_schedule(self.schedule)
        names = names_of(self.regularizers)
        _check_schedule(schedule, names)
        return Replay(self, run, schedule)

    def callback(
        self, model: nn.Module, held_out: Sequence[Batch] = (), *, steps: int | None = None, seed: int = 0
    ) -> STNCallback:
        """Gate the layers of a model and return the callback for a stock `Trainer`; call before `Trainer` is made.

        Args:
            model: a model that returns its loss, such as any of transformers with labels.
            held_out: batches to tune on, in turn, as dicts of what the model takes. Not needed under a schedule.
            steps: optimizer steps of the run, where `hyper_warmup` is a share of them. Default: none.
            seed: of the gates and of the perturbations. Default 0.

        Raises:
            IntaglioError: no held-out batches, a share without `steps`, or see the class.
        """
        if self.schedule is None and not held_out:
            raise IntaglioError("held_out is empty; give at least one batch to tune on")
        if self.schedule is None and steps is None and isinstance(self.hyper_warmup, float):
            raise IntaglioError(f"hyper_warmup is {self.hyper_warmup}, a share; give steps, or a whole number of steps")

        def loss(batch: Batch) -> Loss:
            return Loss(model(**batch)["loss"])

        def batch(number: int) -> Batch:
            device = next(model.parameters()).device
            return {name: value.to(device) for name, value in held_out[number % len(held_out)].items()}

        run = TrainingRun(Checkpoint(model), steps or 0, None, seed, loss, held_out=batch)
        return STNCallback(self.attach(run))  # type: ignore[arg-type]

    def training_cost(self, workload: Workload, steps: float, batch_tokens: int, pass_flops: float) -> Cost:
        """Return the cost of second weights: a further pass in every step, and hyper steps without weight gradients.

        Memory holds the second weights with their gradient and two moments.
        """
        if self.schedule is not None:
            return Cost()
        hyper = 2 * 2 / 3 * self.valid_steps / self.train_steps
        return Cost(flops=steps * pass_flops * (1 + hyper), extra_bytes=16 * workload.block_parameters)


def found_schedule(source: str | Path | Checkpoint | Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
    """Return the schedule of a run with STN, as the columns that `STN(schedule=...)` replays.

    Args:
        source: a checkpoint or its directory, whose last training with stn counts, or the columns of a curve, such as
            `intaglio.trainer.history.columns(result.history)`.

    Raises:
        IntaglioError: there is no such run.
    """
    if isinstance(source, Mapping):
        curves: list[Mapping[str, Any]] = [source]
    else:
        record = source.record if isinstance(source, Checkpoint) else read_record(Path(source).expanduser())
        curves = [step.chosen.get("curve") or {} for step in (record.steps if record else [])]
    for curve in reversed(curves):
        names = [name for name in curve if name.startswith(PART) and not name.startswith(f"{PART}scale of ")]
        if names:
            return {STEP: list(curve[STEP]), **{name.removeprefix(PART): list(curve[name]) for name in names}}
    raise IntaglioError(f"schedule: {source if isinstance(source, str) else 'this run'} holds no training with stn")


def _check_schedule(schedule: Mapping[str, Sequence[float]], names: list[str]) -> None:
    """Refuse columns that do not fit the regularizers."""
    wanted = [STEP, *names]
    if sorted(schedule) != sorted(wanted):
        raise IntaglioError(f"schedule has the columns {', '.join(schedule)}; these are needed: {', '.join(wanted)}")
    lengths, steps = {len(column) for column in schedule.values()}, list(schedule[STEP])
    if lengths in (set(), {0}) or len(lengths) > 1 or steps != sorted(steps):
        raise IntaglioError("schedule needs columns of one length, at least one row, and steps in increasing order")
