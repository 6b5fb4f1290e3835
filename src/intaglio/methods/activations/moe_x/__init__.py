"""MoE-X (Yang et al., Mixture of Experts Made Intrinsically Interpretable, ICML 2025): interpretable experts.

The paper's MoE-X has experts of ReLU units and a router without weights of its own.

    y = Σ_e g_e(x) W_dec,e ReLU(W_enc,e x)      over the K experts with the highest r_e(x) = -erf(m_e / sqrt(2 v_e))

- `routing`: expected sparsity of the experts, the choice, the loss that balances.
- `layers`: experts and router.
- `upcycling`: experts from a dense MLP.
- `expert_statistics`: loads, units that fire, units that are dead.

The layer is one sparse MLP of E F units (`MoELayer.features`, `MoELayer.wide_decoder`): its units, each times its
expert's gate, are what can be read. No official code was found. The paper leaves the normalisation of the gates, the
weight of the balance loss and the way in which copies differ open; here they are `gates`, `balance`, `noise`
and `reset`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.replacement import ReplacesMLPs, non_default_fields
from intaglio.errors import IntaglioError
from intaglio.methods.activations.moe_x.expert_stats import expert_statistics
from intaglio.methods.activations.moe_x.layers import MoELayer, MoELayerConfig, Router, moe_layers
from intaglio.methods.activations.moe_x.routing import Gates, balance_loss
from intaglio.methods.activations.moe_x.upcycling import Source, UpcycleConfig
from intaglio.methods.base import Capability, Cost, Method, Progress, Workload, no_progress
from intaglio.modeling.anatomy import MLP, Anatomy, anatomy
from intaglio.modeling.targets import replace_mlps
from intaglio.trainer import Batch, Loss, ModifierSession, TrainingRun

__all__ = ["MoELayer", "MoELayerConfig", "MoEX", "expert_statistics", "moe_layers"]


class MoEX(ReplacesMLPs, Method, slug="moe_x"):
    """Replaces each block's MLP by experts; a token goes to the few expected to be sparsest, without router weights.

        z_e = ReLU(W_enc,e x + b_enc,e),   y = Σ_e g_e(x) (W_dec,e z_e + b_dec,e),   e among the K highest r_e(x)
        r_e(x) = -erf(m_e / sqrt(2 v_e)),  m_e = mean(W_enc,e) · x + mean(b_enc,e),
                                           v_e = var(W_enc,e) · x² + var(b_enc,e)
        g = softmax of the chosen scores

    Mean and variance are over the units of an expert, for each input coordinate: if its rows are draws of one vector,
    a pre-activation is about normal, a unit fires with probability (1 - r_e) / 2, and the highest scores are the least
    expected L0. They are recomputed from the weights in every pass, and the gradient of the gates passes through them.

    As a step of its own it upcycles: every expert begins as the MLP that is there, so the checkpoint grows to `experts`
    times its MLPs, while a token takes `active` of them. Without `noise` and `reset`, and with the model's own
    activation, the function is unchanged. A ReLU instead of another activation changes it until it is trained on.
    Gated MLPs have no counterpart in the paper: their gate gets the ReLU, so that it decides which units fire, and the
    moments are the gate projection's; or `gated: drop` leaves the gate out, y = down(ReLU(up x)).

    As a modifier of a training step it does the same to a model that has no experts yet; one that has some is trained
    on with `experts: null`. There the loss

        balance · mean over layers of E Σ_e f_e p_e     f_e: e's share of the choices, p_e: its mean probability

    balances the loads; without it, an expert that never fires would look ideal. The log also has the entropy of the
    loads (1: all alike), the units that fire for a token and how many were expected to, and the share of units that
    fired for no token of the batch.

    The checkpoint needs `intaglio.load`. `expert_statistics` returns statistics of the experts.

    Source: Yang et al., Mixture of Experts Made Intrinsically Interpretable, ICML 2025 (arXiv 2503.07639); choices that
    it leaves open are listed in `intaglio.methods.activations.moe_x`. Balance loss: Fedus et al., Switch Transformers,
    JMLR 2022. Units initialised again: Nakamura et al., Drop-Upcycling, ICLR 2025.

    Args:
        experts: E. Default 8. null: those that the model has, in a training step.
        active: K, experts of a token. Default 2.
        router: `sparsity` (default) or `linear`, w_e · x with weights that are trained.
        activation: of the units: `relu` (default), `gelu`, `silu`, or `own`, the model's.
        gated: of MLPs with a gate, whether to `keep` it (default) or `drop` it.
        start: experts begin as a `copy` of the whole MLP (default), or `split` it, each with its share of the units.
            The output is scaled so that even gates give the dense output, of split ones in the mean.
        noise: normal noise on each encoder, over the standard deviation of its weights. Default 0.05; exact copies
            would all have one score.
        reset: share of each expert's units that are initialised again, with the standard deviation of the old weights.
            Default 0; 1: experts from scratch.
        layers: indices of the blocks whose MLPs are replaced. Default: all.
        gates: a softmax over the `chosen` scores (default), or over `all` of them, as in Switch. With one active expert
            the first is always 1, which teaches a linear router nothing.
        temperature: divisor of the scores. Default 1.
        balance: weight of the balance loss in training. Default 0.01.

    Raises:
        IntaglioError: an MLP is not supported or was replaced, experts do not divide its units, the model has experts
            already or has none to train on, or adapters and frozen weights.
    """

    kinds = ("carving", "modifier")
    summary = (
        "turns each MLP into experts and routes each token to those expected to be sparsest, for interpretable units"
    )
    citation = "Yang et al., Mixture of Experts Made Intrinsically Interpretable, ICML 2025"
    url = "https://arxiv.org/abs/2503.07639"
    trains_weights: ClassVar[bool] = True
    module_types: ClassVar[tuple[type[MoELayer], ...]] = (MoELayer,)

    experts: Annotated[int, Field(ge=1)] | None = 8
    active: Annotated[int, Field(ge=1)] = 2
    router: Router = "sparsity"
    activation: Literal["relu", "gelu", "silu", "own"] = "relu"
    gated: Literal["keep", "drop"] = "keep"
    start: Source = "copy"
    noise: Annotated[float, Field(ge=0)] = 0.05
    reset: Annotated[float, Field(ge=0, le=1)] = 0.0
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    gates: Gates = "chosen"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    balance: Annotated[float, Field(ge=0)] = 0.01

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.experts is not None and self.active > self.experts:
            raise ValueError(f"active is {self.active} of {self.experts} experts; at most as many can be active")
        for name in non_default_fields(self) if self.experts is None else []:
            if name not in ("experts", "balance"):
                raise ValueError(f"experts is null and {name} is given; experts that are there stay as they are")
        return self

    @classmethod
    def switch(cls, **overrides: Any) -> Self:
        """Return MoE-X's baseline: experts with a GELU and a linear router, gates as here."""
        return cls(**{"router": "linear", "activation": "gelu", **overrides})

    # Experts that are there already need and invalidate nothing.
    @property
    def requires(self) -> frozenset[Capability]:  # type: ignore[override]
        """Plain weights, to make experts of."""
        return frozenset() if self.experts is None else frozenset({"linear_weights"})

    @property
    def invalidates(self) -> frozenset[Capability]:  # type: ignore[override]
        """Plain weights, matrix products and zeros of the MLPs."""
        return frozenset() if self.experts is None else frozenset({"linear_weights", "matrix_products", "zeros"})

    def layer_configs(self, parts: Anatomy) -> dict[int, MoELayerConfig]:
        """Return the config of each new layer, by block.

        Raises:
            IntaglioError: see the class.
        """
        blocks, indices = len(parts.blocks), self.layers or list(range(len(parts.blocks)))
        for position, index in enumerate(indices):
            if index >= blocks:
                raise IntaglioError(f"layers names {index}; the model has blocks 0 to {blocks - 1}")
            if index in indices[:position]:
                raise IntaglioError(f"layers names {index} twice")
        return {index: self._layer_config(parts, index) for index in indices}

    def _layer_config(self, parts: Anatomy, index: int) -> MoELayerConfig:
        assert self.experts is not None  # called for new experts alone
        mlp = self._mlp(parts, index)
        units, hidden = mlp.into.shape
        if self.start == "split" and units % self.experts:
            raise IntaglioError(
                f"experts is {self.experts}, which does not divide the {units} units of "
                f"layers.{index}.{mlp.where.place}; start: split needs a divisor"
            )
        linears = (mlp.into, mlp.factor, mlp.out)
        encoder, factor, decoder = (linear is not None and linear.module.bias is not None for linear in linears)
        return MoELayerConfig(
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
        """Return the MLP that a block's experts are made of, without its gate if that is dropped."""
        mlp = parts.mlp(index)
        if self.gated == "keep" or mlp.factor is None:
            return mlp
        return replace(mlp, into=mlp.factor, factor=None)

    def check_model(self, parts: Anatomy) -> None:
        """Refuse, before any work, MLPs that are not supported or whose units the experts do not divide."""
        if self.experts is None:  # an earlier step may still put in the experts to train on
            return
        if moe_layers(parts.model):
            raise IntaglioError("the model has experts of moe_x already; to train them on, set experts: null")
        self.layer_configs(parts)

    def estimate(self, workload: Workload) -> Cost:
        """Return the memory of the experts beyond the model's; nothing is computed."""
        if self.experts is None or self.start == "split":
            return Cost()
        return Cost(extra_bytes=(self.experts - 1) * _mlp_parameters(workload) * workload.element_size)

    def training_cost(self, workload: Workload, steps: float, batch_tokens: int, pass_flops: float) -> Cost:
        """Return the cost beyond the dense model's: more experts a token, and the optimizer's memory of all."""
        if self.experts is None:
            return Cost()
        dense = _mlp_parameters(workload)
        expert = dense / (self.experts if self.start == "split" else 1)
        products = 6.0 * (self.active * expert - dense) * batch_tokens
        moments = 6.0 * self.experts * expert  # sums over the encoders, forward and backward
        return Cost(flops=steps * max(0.0, products + moments), extra_bytes=int(12 * (self.experts * expert - dense)))

    @torch.no_grad()
    def replace(self, model: nn.Module, *, seed: int = 0, progress: Progress = no_progress) -> dict[int, MoELayer]:
        """Replace MLPs by experts, in place, and return the layers by block.

        Args:
            model: a transformer.
            seed: of noise, of units that are drawn anew and of a linear router. Default 0.
            progress: called after each block.

        Raises:
            IntaglioError: see the class.
        """
        if self.experts is None:
            raise IntaglioError(
                "experts is null, which trains those that a model has; as a step of its own give a number"
            )
        parts = anatomy(model)
        self.check_model(parts)
        configs = self.layer_configs(parts)
        router_std = float(getattr(parts.config, "initializer_range", None) or UpcycleConfig.router_std)
        start = UpcycleConfig(self.start, self.noise, self.reset, router_std, seed)

        def make(index: int, parts: Anatomy) -> MoELayer:
            mlp = self._mlp(parts, index)
            layer = start.build(f"layers.{index}.{mlp.where.place}", mlp, configs[index])
            progress(list(configs).index(index) + 1, len(configs), f"moe_x: layers.{index}")
            return layer

        return replace_mlps(model, make, configs)

    def _replace(self, checkpoint: Checkpoint, seed: int, progress: Progress = no_progress) -> dict[str, Any]:
        """Replace MLPs, note the live part, and return the sizes for the record."""
        layers = self.replace(checkpoint.model, seed=seed, progress=progress)
        configs = {index: layer.config for index, layer in layers.items()}
        checkpoint.set_runtime_state(
            self.slug, {"layers": [[index, config.to_dict()] for index, config in configs.items()]}
        )
        return {
            "layers": len(configs),
            "units": [config.units for config in configs.values()],
            "parameters": sum(config.experts * config.expert_parameters for config in configs.values()),
            "active_parameters": sum(config.active * config.expert_parameters for config in configs.values()),
        }

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
            checkpoint: the checkpoint.
            calibration: Ignored; kept for API compatibility.
            seed: of noise, of units that are drawn anew and of a linear router. Default 0.
            batch_size: Ignored; kept for API compatibility.
            progress: called after each block.

        Raises:
            IntaglioError: see the class.
        """
        chosen = self._replace(checkpoint, seed, progress)
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, chosen=chosen)
        return checkpoint

    @classmethod
    def build_empty(cls, part: Mapping[str, Any], model: nn.Module) -> None:
        """Put empty layers into a model without weights."""
        configs = {int(index): MoELayerConfig.from_dict(config) for index, config in part["layers"]}

        def empty(index: int, parts: Anatomy) -> MoELayer:
            return MoELayer(configs[index], device="meta", dtype=parts.mlp(index).into.module.weight.dtype)

        replace_mlps(model, empty, configs)

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Check that the layers are in a loaded model, and align their weights as torch does.

        Weight files are mapped into memory unaligned, and the product of an expert that has one token differs in its
        last bit with the alignment of its matrix.
        """
        cls.check_restored(checkpoint.model, len(part["layers"]))
        for layer in moe_layers(checkpoint.model).values():
            for parameter in layer.parameters():
                parameter.data = parameter.data.clone()

    def attach(self, run: TrainingRun) -> ModifierSession:
        """Put experts into the model, or take those that are there, and watch them.

        Raises:
            IntaglioError: see the class.
        """
        self.refuse_frozen(run.model)
        if self.experts is not None:
            self._replace(run.checkpoint, run.seed)
        layers = list(moe_layers(run.model).values())
        if not layers:
            raise IntaglioError("experts is null, and the model has none to train on; give a number")
        return _Session(self.balance, layers)


class _Session(ModifierSession):
    """A training of experts: the balance loss, and what the experts do for the log."""

    def __init__(self, balance: float, layers: list[MoELayer]) -> None:
        self._balance, self._layers = balance, layers
        for layer in layers:
            layer.watched = True

    def extra_loss(self, model: nn.Module, batch: Batch, outputs: Any) -> Loss | None:
        mask = batch.get("attention_mask")
        real_T = mask.flatten().bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        routed = [(layer.config, layer.routed.masked(real_T)) for layer in self._layers if layer.routed]
        if not routed:
            return None
        for layer in self._layers:
            layer.routed = None
        balance = torch.stack([balance_loss(stats.scores_TE, stats.chosen_TK) for _, stats in routed]).mean()
        summaries = [stats.summary(config) for config, stats in routed]
        parts = {name: fmean(summary[name] for summary in summaries) for name in summaries[0]}
        return Loss(self._balance * balance, {"expert balance": balance.detach(), **parts})

    def detach(self) -> None:
        for layer in self._layers:
            layer.watched, layer.routed = False, None


def _mlp_parameters(workload: Workload) -> int:
    """Return the numbers of all MLPs: their projections are wider than the hidden state on one side."""
    return sum(rows * columns for rows, columns in workload.linears if max(rows, columns) > workload.hidden)
