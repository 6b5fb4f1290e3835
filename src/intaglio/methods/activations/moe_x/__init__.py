"""MoEX (Yang et al., Mixture of Experts Made Intrinsically Interpretable, ICML 2025): experts made to be read.

MoE-X, as the paper writes it, has experts of ReLU units and a router without weights of its own.

    y = Σ_e g_e(x) W_dec,e ReLU(W_enc,e x)      over the K experts with the highest r_e(x) = -erf(m_e / sqrt(2 v_e))

- `routing`: how sparse each expert would be, the choice, the loss that balances.
- `layer`: experts and router in the place of an MLP.
- `upcycle`: experts out of a dense MLP, and their way through a reload.
- `monitor`: loads, units that fire, units that are dead.

The layer is one sparse MLP of E F units (`MoELayer.features`, `MoELayer.wide_decoder`): its units, each times its
expert's gate, are what can be read. No official code was found. The paper leaves the normalisation of the gates, the
weight of the balance loss and the way in which copies are told apart open; here they are `gates`, `balance`, `noise`
and `reset`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.activations.moe_x import upcycle
from intaglio.methods.activations.moe_x.layer import Form, MoELayer, Router, moe_layers
from intaglio.methods.activations.moe_x.monitor import monitor
from intaglio.methods.activations.moe_x.routing import Gates, balance_loss
from intaglio.methods.activations.moe_x.upcycle import By, Start, check_indices, put_layers
from intaglio.methods.base import Capability, Cost, Depends, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.modeling.anatomy import MLP, Anatomy, anatomy
from intaglio.trainer import Batch, Loss, ModifierSession, TrainingRun

_NOTHING: frozenset[Capability] = frozenset()
_PLAIN: frozenset[Capability] = frozenset({"linear_weights"})
_REPLACES: frozenset[Capability] = frozenset({"linear_weights", "matrix_products", "zeros"})


class MoEX(Method, slug="moe_x"):
    """Makes experts of each block's MLP; a token goes to a few, chosen for being sparse without router weights.

        z_e = ReLU(W_enc,e x + b_enc,e),   y = Σ_e g_e(x) (W_dec,e z_e + b_dec,e),   e among the K highest r_e(x)
        r_e(x) = -erf(m_e / sqrt(2 v_e)),  m_e = mean(W_enc,e) · x + mean(b_enc,e),
                                           v_e = var(W_enc,e) · x² + var(b_enc,e)
        g = softmax of the chosen scores

    Mean and variance are over the units of an expert, for each input coordinate: if its rows are draws of one vector,
    a pre-activation is about normal, a unit fires with probability (1 - r_e) / 2, and the highest scores are the least
    expected L0. They are taken anew from the weights in every pass, and the gradient of the gates passes through them.

    As a step of its own it upcycles: every expert begins as the MLP that is there, so the checkpoint grows to `experts`
    times its MLPs, while a token takes `active` of them. Without `noise` and `reset`, and with the model's own
    activation, the function stays what it was. A ReLU in the place of another activation changes it until it is
    trained on. Gated MLPs have no counterpart in the paper: their gate gets the ReLU, so that it decides which units
    fire, and the moments are the gate projection's; or `gated: drop` leaves the gate out, y = down(ReLU(up x)).

    In a training step's `shape` the same happens to a model that has no experts yet; one that has some is trained on
    with `experts: null`. There the loss

        balance · mean over layers of E Σ_e f_e p_e     f_e: e's share of the choices, p_e: its mean probability

    keeps the loads alike, without which an expert that never fires would look ideal. The log has, beside it: the
    entropy of the loads (1: all alike), the units that fire for a token and how many were expected to, and the share of
    units that fired for no token of the batch.

    The checkpoint becomes a live one (`intaglio.load` reads it). `monitor` says what the experts do on some text.

    Source: Yang et al., Mixture of Experts Made Intrinsically Interpretable, ICML 2025 (arXiv 2503.07639); see the
    module for what it leaves open. Balance loss: Fedus et al., Switch Transformers, JMLR 2022. Units drawn anew:
    Nakamura et al., Drop-Upcycling, ICLR 2025.

    Args:
        experts: E. Default 8. null: those that the model has, in a training step.
        active: K, of them for each token. Default 2.
        router: `sparsity` (default) or `linear`, w_e · x with weights that are trained.
        activation: of the units: `relu` (default), `gelu`, `silu`, or `own`, the model's.
        gated: of MLPs with a gate, whether to `keep` it (default) or `drop` it.
        start: experts begin as a `copy` of the whole MLP (default), or `split` it, each with its share of the units.
            What comes out is scaled so that even gates give the dense output, of split ones in the mean.
        noise: normal noise on each encoder, over the standard deviation of its weights. Default 0.05; exact copies
            would all have one score.
        reset: share of each expert's units that are drawn anew, as wide as the weights that were there. Default 0;
            1: experts from scratch.
        layers: blocks whose MLPs are replaced, from 0. Default: all.
        gates: a softmax over the `chosen` scores (default), or over `all` of them, as in Switch. With one active expert
            the first is always 1, which teaches a linear router nothing.
        temperature: that scores are divided by. Default 1.
        balance: weight of the balance loss in training. Default 0.01.

    Raises:
        IntaglioError: an MLP is not understood or was replaced, experts do not divide its units, the model has experts
            already or has none to train on, or adapters and frozen weights are beside it.
    """

    storage: ClassVar[Literal["runtime"]] = "runtime"
    needs_calibration: ClassVar[bool] = False
    trains_weights: ClassVar[bool] = True
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights", "activations"})
    # Experts that are there already need and undo nothing.
    requires: ClassVar[frozenset[Capability]] = cast(
        frozenset[Capability], Depends(_PLAIN, lambda step: _NOTHING if step.experts is None else _PLAIN)
    )
    invalidates: ClassVar[frozenset[Capability]] = cast(
        frozenset[Capability], Depends(_REPLACES, lambda step: _NOTHING if step.experts is None else _REPLACES)
    )

    experts: Annotated[int, Field(ge=1)] | None = 8
    active: Annotated[int, Field(ge=1)] = 2
    router: Router = "sparsity"
    activation: Literal["relu", "gelu", "silu", "own"] = "relu"
    gated: Literal["keep", "drop"] = "keep"
    start: By = "copy"
    noise: Annotated[float, Field(ge=0)] = 0.05
    reset: Annotated[float, Field(ge=0, le=1)] = 0.0
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    gates: Gates = "chosen"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    balance: Annotated[float, Field(ge=0)] = 0.01

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.experts is not None and self.active > self.experts:
            raise ValueError(f"active is {self.active} of {self.experts} experts; at most as many can be active")
        if self.experts is None:
            plain = type(self).model_construct()
            for name in type(self).model_fields:
                if name not in ("experts", "balance") and getattr(self, name) != getattr(plain, name):
                    raise ValueError(f"experts is null and {name} is given; experts that are there stay as they are")
        return self

    @classmethod
    def switch(cls, **overrides: Any) -> Self:
        """What MoE-X is held against: experts with a GELU behind a linear router, gates as here.

        Args:
            overrides: fields that the caller sets.
        """
        return cls(**{"router": "linear", "activation": "gelu", **overrides})

    def forms(self, parts: Anatomy) -> dict[int, Form]:
        """What each block's experts would be.

        Args:
            parts: of the model.

        Raises:
            IntaglioError: see the class.
        """
        assert self.experts is not None  # asked for new ones alone
        check_indices(self.layers or [], len(parts.blocks))
        return {index: self._form(parts, index) for index in self.layers or range(len(parts.blocks))}

    def _form(self, parts: Anatomy, index: int) -> Form:
        assert self.experts is not None
        mlp = self._mlp(parts, index)
        units, hidden = mlp.into.shape
        if self.start == "split" and units % self.experts:
            raise IntaglioError(
                f"experts is {self.experts}, which does not divide the {units} units of "
                f"layers.{index}.{mlp.where.place}; start: split needs a divisor"
            )
        linears = (mlp.into, mlp.factor, mlp.out)
        encoder, factor, decoder = (linear is not None and linear.module.bias is not None for linear in linears)
        return Form(
            hidden=hidden,
            units=units // self.experts if self.start == "split" else units,
            experts=self.experts,
            active=self.active,
            activation=mlp.activation if self.activation == "own" else self.activation,
            router=self.router,
            gates=self.gates,
            temperature=self.temperature,
            factor=mlp.factor is not None,
            biases=(encoder, factor, decoder),
            dropout=mlp.dropout,
        )

    def _mlp(self, parts: Anatomy, index: int) -> MLP:
        """The MLP that a block's experts are made of, without its gate if that is dropped."""
        mlp = parts.mlp(index)
        if self.gated == "keep" or mlp.factor is None:
            return mlp
        return replace(mlp, into=mlp.factor, factor=None)

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Nothing is asked of single projections.

        Args:
            linears: not looked at.
        """

    def check_model(self, parts: Anatomy) -> None:
        """Refuse, before any work, MLPs that are not understood or whose units the experts do not divide.

        Args:
            parts: of the model.

        Raises:
            IntaglioError: says which.
        """
        # A step before this one may still put in the experts that are to be trained on.
        if self.experts is not None:
            self._refuse_second(parts.model)
            self.forms(parts)

    def _refuse_second(self, model: nn.Module) -> None:
        if moe_layers(model):
            raise IntaglioError("the model has experts of moe_x already; to train them on, set experts: null")

    def estimate(self, workload: Workload) -> Cost:
        """The experts' memory beside the model's; nothing is computed.

        Args:
            workload: of the model.
        """
        if self.experts is None or self.start == "split":
            return Cost()
        return Cost(extra_bytes=(self.experts - 1) * self._dense(workload) * workload.element_size)

    @staticmethod
    def _dense(workload: Workload) -> int:
        """Numbers of all MLPs: their projections are those that are wider than the hidden state on one side."""
        return sum(rows * columns for rows, columns in workload.linears if max(rows, columns) > workload.hidden)

    def training_cost(self, workload: Workload, steps: float, batch_tokens: int, pass_flops: float) -> Cost:
        """What experts take beside the dense model: more of them a token, and the optimizer's memory of all.

        Args:
            workload: of the model.
            steps: optimizer steps.
            batch_tokens: of a batch.
            pass_flops: not looked at.
        """
        if self.experts is None:
            return Cost()
        of_one = self._dense(workload) / (self.experts if self.start == "split" else 1)
        more = 6.0 * (self.active * of_one - self._dense(workload)) * batch_tokens
        # Moments: sums over the encoders, forward and backward.
        taken = 6.0 * self.experts * of_one
        return Cost(
            flops=steps * max(0.0, more + taken),
            extra_bytes=int(12 * (self.experts * of_one - self._dense(workload))),
        )

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Replace the MLPs of `checkpoint` by experts, in place, and return it.

        Args:
            checkpoint: what is carved.
            calibration: not looked at.
            seed: of noise, of units that are drawn anew and of a linear router. Default 0.
            batch_size: not used.
            progress: called after each block.

        Raises:
            IntaglioError: see the class.
        """
        if self.experts is None:
            raise IntaglioError(
                "experts is null, which trains those that a model has; as a step of its own give a number"
            )
        chosen = self._put(checkpoint, seed, progress)
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, chosen=chosen)
        return checkpoint

    @torch.no_grad()
    def _put(self, checkpoint: Checkpoint, seed: int, progress: Progress = no_progress) -> dict[str, Any]:
        """Put experts into the model, note them for the reload, and return what the record says of them."""
        parts = anatomy(checkpoint.model)
        self._refuse_second(checkpoint.model)
        forms = self.forms(parts)
        std = float(getattr(parts.config, "initializer_range", None) or Start.router_std)
        start = Start(self.start, self.noise, self.reset, std, seed)
        made: dict[int, MoELayer] = {}
        for index, form in forms.items():
            mlp = self._mlp(parts, index)
            made[index] = start.layer(f"layers.{index}.{mlp.where.place}", mlp, form)
            progress(len(made), len(forms), f"moe_x: layers.{index}")
        put_layers(parts, made)
        checkpoint.set_runtime_state(self.slug, {"layers": [[index, form.as_data()] for index, form in forms.items()]})
        numbers = [form.expert_parameters for form in forms.values()]
        return {
            "layers": len(forms),
            "units": [form.units for form in forms.values()],
            "parameters": sum(form.experts * one for form, one in zip(forms.values(), numbers, strict=True)),
            "active_parameters": sum(form.active * one for form, one in zip(forms.values(), numbers, strict=True)),
        }

    @classmethod
    def build_empty(cls, part: Mapping[str, Any], model: nn.Module) -> None:
        """Put empty layers into a model that has no weights yet.

        Args:
            part: of the record.
            model: on the meta device.
        """
        upcycle.build_empty(part, model)

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """See that the layers are there.

        Args:
            part: of the record.
            checkpoint: just loaded.
        """
        upcycle.restore_runtime(part, checkpoint.model)

    def attach(self, run: TrainingRun) -> ModifierSession:
        """Put experts into the model, or find those that are there, and watch them."""
        model = run.model
        # Adapters stand in the projections' places.
        if getattr(model, "peft_config", None) or not any(p.requires_grad for p in model.parameters()):
            raise IntaglioError("moe_x trains the experts' own weights; leave lora and freeze out")
        if self.experts is not None:
            self._put(run.checkpoint, run.seed)
        layers = moe_layers(model)
        if not layers:
            raise IntaglioError("experts is null, and the model has none to train on; give a number")
        return _Session(self.balance, layers)


class _Session(ModifierSession):
    """Adds the balance loss of each pass, and logs expert statistics."""

    def __init__(self, balance: float, layers: Mapping[str, MoELayer]) -> None:
        self.balance, self.layers = balance, layers
        for layer in layers.values():
            layer.watched = True

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss | None:
        seen = [(layer.form, layer.routed.kept(_real(batch))) for layer in self.layers.values() if layer.routed]
        if not seen:
            return None
        for layer in self.layers.values():
            layer.routed = None
        balance = torch.stack([balance_loss(routed.scores_TE, routed.chosen_TK) for _, routed in seen]).mean()
        told = [routed.told(form) for form, routed in seen]
        parts = {name: fmean(one[name] for one in told) for name in told[0]}
        return Loss(self.balance * balance, {"expert balance": balance.detach(), **parts})

    def detach(self) -> None:
        for layer in self.layers.values():
            layer.watched, layer.routed = False, None


def _real(batch: Batch) -> Tensor | None:
    """Which tokens of a batch are no padding, bool [T]; None: all."""
    mask = batch.get("attention_mask")
    return mask.flatten().bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


__all__ = ["Form", "MoELayer", "MoEX", "moe_layers", "monitor"]
