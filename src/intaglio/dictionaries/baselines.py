"""Sparse autoencoders that GBA is compared with: L1, TopK, BatchTopK, JumpReLU and Gated.

Inputs have a mean squared norm of 1 around b_dec, decoder rows the norm 1; r is x - x̂. Hyperparameters are those of
the reference trainers (saprmarks/dictionary_learning), whose steps are shares of the run here where the run is shorter.

Dimension letters: B batch, D width, M latents, E active entries.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from intaglio.dictionaries.active_entries import ActiveEntries, decode
from intaglio.dictionaries.dictionary import Architecture
from intaglio.dictionaries.sparse_autoencoder import Count, SparseAutoencoder
from intaglio.dictionaries.training import TrainingRun, unit_rows
from intaglio.methods.base import Kind

AUXILIARY = 1 / 32
"""Weight of the loss that dead latents share."""
THRESHOLD_DECAY = 0.999
"""Of the moving average of BatchTopK's smallest kept activation."""
BANDWIDTH = 0.001
"""ε of JumpReLU's straight-through estimators."""
RESAMPLED_SCALE = 0.2
"""Norm of a resampled encoder row, relative to the mean of those of latents that fire."""


def _squared_error(x_BD: Tensor, reconstructed_BD: Tensor) -> Tensor:
    """Return the mean over the batch of ||x - x̂||²."""
    return (x_BD - reconstructed_BD).square().sum(1).mean()


class _Untied(SparseAutoencoder):
    """Encoder rows that start as the decoder's, and a bias for each latent.

    Args:
        frozen_decoder: whether decoder rows stay as drawn: a control with random features. Default false.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ()
    architecture: ClassVar[Architecture]

    frozen_decoder: bool = False

    def decoder(self, run: TrainingRun) -> Tensor:
        """Return the decoder rows of a training step."""
        return run["W_dec"].detach() if self.frozen_decoder else run["W_dec"]

    def new_parameters(self, inputs: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return random decoder rows, the same rows for the encoder, and biases of 0."""
        rows_MD = unit_rows(self.width, inputs, generator)
        return {"W_enc": rows_MD.clone(), "W_dec": rows_MD, "b_enc": torch.zeros(self.width)}

    def finished(self, run: TrainingRun) -> tuple[Architecture, dict[str, Tensor], int]:
        """Return the trained tensors."""
        names = ("W_dec", "b_dec", "b_enc")
        return self.architecture, {"W_enc": run["W_enc"].T, **{name: run[name] for name in names}}, 0


class L1SAE(_Untied, slug="l1_sae"):
    """Train a ReLU autoencoder with a penalty on the sum of its codes.

        z = ReLU(W_enc (x - b_dec) + b_enc),   loss = ||r||² + λ ||z||₁

    λ rises from 0 over the first steps. Latents that fired for no input since the last resampling get the direction of
    an input with a large loss (drawn in proportion to its square), a small encoder row and a bias of 0.

    Args:
        l1: λ. Default 0.05.
        l1_warmup: share of the steps in which λ rises. Default 0.05.
        resamplings: times that dead latents are resampled, evenly over the first 60 % of the steps; none in a run too
            short for so many. Default 3.

    Source: Bricken et al., Towards Monosemanticity, 2023; as the baseline of Makelov et al., arXiv 2405.08366.
    """

    kinds = ("dictionary",)
    summary = "trains a ReLU dictionary with an L1 penalty"
    architecture = "standard"

    l1: Annotated[float, Field(ge=0)] = 0.05
    l1_warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    resamplings: Annotated[int, Field(ge=0, le=1000)] = 3

    def new_state(self) -> dict[str, Tensor]:
        """Return the latents that fired since the last resampling."""
        return {"fired": torch.zeros(self.width, dtype=torch.bool)}

    def loss(self, run: TrainingRun, x_BD: Tensor) -> Tensor:
        """Return the squared error and the penalty."""
        pre_BM = run.pre(x_BD, bias=run["b_enc"])
        at = ActiveEntries.from_mask(pre_BM > 0)
        codes_E = run.values(pre_BM, x_BD, run["b_enc"], at)
        run.fired(at)
        run.state["fired"][at.latents_E] = True
        penalty = codes_E.sum() / len(x_BD)
        weight = self.l1 * run.warmed(round(self.l1_warmup * run.steps))
        return _squared_error(x_BD, decode(codes_E, self.decoder(run), run["b_dec"], at)) + weight * penalty

    def after_step(self, run: TrainingRun, x_BD: Tensor) -> None:
        """Resample dead latents where it is time."""
        every = int(0.6 * run.steps / self.resamplings) if self.resamplings else 0
        if not every or run.step % every or run.step > every * self.resamplings:
            return
        dead = (~run.state["fired"]).nonzero()[:, 0]
        run.state["fired"].zero_()
        if not len(dead):
            return
        codes_BM = torch.relu(run.pre(x_BD, bias=run["b_enc"]))
        errors_B = (x_BD - codes_BM @ run["W_dec"] - run["b_dec"]).square().sum(1)
        # The generator belongs to the run, so that a resumed run draws the same inputs.
        rows = torch.multinomial(errors_B.square().cpu() + 1e-12, len(dead), True, generator=run.generator)
        directions = F.normalize(x_BD[rows.to(x_BD.device)] - run["b_dec"], dim=1)
        alive = torch.ones(self.width, dtype=torch.bool, device=x_BD.device)
        alive[dead] = False
        norm = run["W_enc"][alive].norm(dim=1).mean() if alive.any() else torch.ones((), device=x_BD.device)
        if not self.frozen_decoder:
            run["W_dec"][dead] = directions
        run["W_enc"][dead] = directions * norm * RESAMPLED_SCALE
        run["b_enc"][dead] = 0
        for name in ("W_dec", "W_enc", "b_enc"):
            moments = run.optimizer.state.get(run[name])
            if moments is None:  # a frozen decoder
                continue
            moments["exp_avg"][dead] = 0
            moments["exp_avg_sq"][dead] = 0


class _TopKBase(_Untied):
    """Shared part of TopK and BatchTopK: k, and the loss that revives dead latents."""

    kinds: ClassVar[tuple[Kind, ...]] = ()
    max_grad_norm: ClassVar[float | None] = 1.0

    k: Annotated[int, Field(ge=1)] = 32
    dead_after: Count | None = None
    auxiliary: Annotated[float, Field(ge=0)] = AUXILIARY

    @model_validator(mode="after")
    def _check_k(self) -> Self:
        if self.k > self.width:
            raise ValueError(f"width is {self.width} and k is {self.k}; a code needs as many latents as are active")
        return self

    def chosen(self, pre_BM: Tensor) -> ActiveEntries:
        """Return the active entries of a batch."""
        raise NotImplementedError

    def loss(self, run: TrainingRun, x_BD: Tensor) -> Tensor:
        """Return the squared error and the auxiliary loss."""
        pre_BM = run.pre(x_BD, bias=run["b_enc"])
        at = self.chosen(pre_BM)
        codes_E = torch.relu(run.values(pre_BM, x_BD, run["b_enc"], at))
        self.observe(run, codes_E.detach())
        run.fired(at.where(codes_E.detach() > 0))
        reconstructed_BD = decode(codes_E, self.decoder(run), run["b_dec"], at)
        loss = _squared_error(x_BD, reconstructed_BD)
        return loss + self._auxiliary_loss(run, x_BD, pre_BM, (x_BD - reconstructed_BD).detach())

    def observe(self, run: TrainingRun, codes_E: Tensor) -> None:
        """Take in the codes of a batch; default nothing."""

    def _auxiliary_loss(self, run: TrainingRun, x_BD: Tensor, pre_BM: Tensor, residual_BD: Tensor) -> Tensor | float:
        """Return the normalised error of predicting the residual from the largest dead latents."""
        after = min(10_000_000, self.tokens // 10) if self.dead_after is None else self.dead_after
        dead_M = run.state["silent"] >= after
        count = min(int(dead_M.sum()), max(1, x_BD.shape[1] // 2))
        if not count or not self.auxiliary:
            return 0.0
        latents_BK = pre_BM.masked_fill(~dead_M, -torch.inf).topk(count, dim=1, sorted=False).indices
        at = ActiveEntries.from_topk(latents_BK, self.width)
        codes_E = torch.relu(run.values(pre_BM, x_BD, run["b_enc"], at))
        guess_BD = decode(codes_E, self.decoder(run), torch.zeros_like(run["b_dec"]), at)
        scale = (residual_BD - residual_BD.mean(0)).square().sum(1).mean().clamp_min(1e-12)
        return self.auxiliary * _squared_error(residual_BD, guess_BD) / scale


class TopKSAE(_TopKBase, slug="topk_sae"):
    """Train an autoencoder that keeps the k largest latents of each input.

        z = ReLU(p) at the k largest p = W_enc (x - b_dec) + b_enc,   loss = ||r||² + α ||r - r̂||² / ||r - mean r||²

    r̂ is the reconstruction of the residual from the D / 2 largest dead latents.

    Args:
        k: active latents of an input. Default 32.
        dead_after: activations without firing after which a latent is dead. Default: 10 million, at most a tenth of
            `tokens`.
        auxiliary: α. Default 1/32.

    Raises:
        IntaglioError: k is above the width.

    Source: Gao et al., Scaling and Evaluating Sparse Autoencoders, 2024, arXiv 2406.04093.
    """

    kinds = ("dictionary",)
    summary = "trains a dictionary that keeps the k largest latents of each input"
    architecture = "topk"

    def chosen(self, pre_BM: Tensor) -> ActiveEntries:
        """Return the k largest latents of each row."""
        return ActiveEntries.from_topk(pre_BM.topk(self.k, dim=1, sorted=False).indices, self.width)

    def finished(self, run: TrainingRun) -> tuple[Architecture, dict[str, Tensor], int]:
        """Return the trained tensors, and k."""
        architecture, tensors, _ = super().finished(run)
        return architecture, tensors, self.k


class BatchTopKSAE(_TopKBase, slug="batch_topk_sae"):
    """Train an autoencoder that keeps the k B largest latents of a batch of B inputs.

    Inference has one threshold instead, the moving average of the smallest activation that a batch kept; the result is
    a JumpReLU dictionary.

    Args:
        k: mean number of active latents of an input. Default 32.
        dead_after: see `TopKSAE`.
        auxiliary: see `TopKSAE`. Default 1/32.
        threshold_start: step from which the average is taken. Default: 1,000, at most half of the steps.

    Raises:
        IntaglioError: k is above the width.

    Source: Bussmann, Leask and Nanda, BatchTopK Sparse Autoencoders, 2024, arXiv 2412.06410.
    """

    kinds = ("dictionary",)
    summary = "trains a dictionary that keeps the largest latents of a batch"
    architecture = "jumprelu"

    threshold_start: Annotated[int, Field(ge=0)] | None = None

    def new_state(self) -> dict[str, Tensor]:
        """Return the threshold, negative before the first average."""
        return {"threshold": torch.full((), -1.0)}

    def chosen(self, pre_BM: Tensor) -> ActiveEntries:
        """Return the k B largest latents of the batch."""
        places = pre_BM.flatten().topk(self.k * len(pre_BM), sorted=False).indices.sort().values
        return ActiveEntries(places // self.width, places % self.width, (len(pre_BM), self.width))

    def observe(self, run: TrainingRun, codes_E: Tensor) -> None:
        """Average the smallest kept activation."""
        start = min(1000, run.steps // 2) if self.threshold_start is None else self.threshold_start
        kept_E = codes_E[codes_E > 0]
        if run.step < start or not len(kept_E):
            return
        threshold, smallest = run.state["threshold"], kept_E.min()
        decayed = THRESHOLD_DECAY * threshold + (1 - THRESHOLD_DECAY) * smallest
        threshold.copy_(torch.where(threshold < 0, smallest, decayed))

    def finished(self, run: TrainingRun) -> tuple[Architecture, dict[str, Tensor], int]:
        """Return the trained tensors and the threshold."""
        architecture, tensors, k = super().finished(run)
        threshold_M = run.state["threshold"].clamp_min(0).expand(self.width)
        return architecture, tensors | {"threshold": threshold_M}, k


class _Jump(torch.autograd.Function):
    """p where p > θ; θ has the straight-through gradient -(θ / ε) 1[|p - θ| < ε / 2]."""

    @staticmethod
    def forward(ctx: Any, pre_E: Tensor, threshold_E: Tensor) -> Tensor:
        ctx.save_for_backward(pre_E, threshold_E)
        return pre_E * (pre_E > threshold_E)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pre_E, threshold_E = ctx.saved_tensors
        near_E = (pre_E - threshold_E).abs() < BANDWIDTH / 2
        return grads[0] * (pre_E > threshold_E), -(threshold_E / BANDWIDTH) * near_E * grads[0]


class _Step(torch.autograd.Function):
    """1 where p > θ; θ has the straight-through gradient -(1 / ε) 1[|p - θ| < ε / 2], p has none."""

    @staticmethod
    def forward(ctx: Any, pre_E: Tensor, threshold_E: Tensor) -> Tensor:
        ctx.save_for_backward(pre_E, threshold_E)
        return (pre_E > threshold_E).to(pre_E)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pre_E, threshold_E = ctx.saved_tensors
        near_E = (pre_E - threshold_E).abs() < BANDWIDTH / 2
        return None, -(1 / BANDWIDTH) * near_E * grads[0]


class JumpReLUSAE(_Untied, slug="jumprelu_sae"):
    """Train an autoencoder with a learned threshold for each latent.

        z = p 1[p > θ],   p = W_enc (x - b_dec) + b_enc,   loss = ||r||² + λ (L0 / target - 1)²

    L0 is the mean number of active latents; θ >= 0 learns through straight-through estimators of width ε = 0.001.
    λ rises from 0 over the first steps.

    Args:
        l0: the target. Default 32.
        sparsity: λ. Default 1.
        quadratic: whether the penalty is the squared distance to the target; False: λ L0. Default true.
        sparsity_warmup: steps in which λ rises. Default: 2,000, at most a fifth of all.
        start_threshold: θ at the start. Default 0.001.

    Raises:
        IntaglioError: the target is above the width.

    The reference trainer's estimator of L0 counts entries within ε / 2 above θ alone; the paper's and this one count
    both sides.

    Source: Rajamanoharan et al., Jumping Ahead, 2024, arXiv 2407.14435; Adam's betas (0, 0.999), learning rate 7e-5.
    """

    kinds = ("dictionary",)
    summary = "trains a dictionary with a learned threshold for each latent"
    architecture = "jumprelu"
    betas: ClassVar[tuple[float, float]] = (0.0, 0.999)
    max_grad_norm: ClassVar[float | None] = 1.0

    l0: Annotated[float, Field(gt=0)] = 32.0
    sparsity: Annotated[float, Field(ge=0)] = 1.0
    quadratic: bool = True
    sparsity_warmup: Annotated[int, Field(ge=0)] | None = None
    start_threshold: Annotated[float, Field(ge=0)] = 0.001

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.l0 > self.width:
            raise ValueError(f"width is {self.width} and l0 is {self.l0}; a code needs as many latents as are active")
        return self

    @property
    def rate(self) -> float:
        """The learning rate."""
        return 7e-5 if self.learning_rate is None else self.learning_rate

    def new_parameters(self, inputs: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the untied start, and thresholds."""
        thresholds = {"threshold": torch.full((self.width,), self.start_threshold)}
        return super().new_parameters(inputs, generator) | thresholds

    def loss(self, run: TrainingRun, x_BD: Tensor) -> Tensor:
        """Return the squared error and the penalty."""
        pre_BM = run.pre(x_BD, bias=run["b_enc"])
        threshold_M = run["threshold"].detach()
        at = ActiveEntries.from_mask((pre_BM > threshold_M) | ((pre_BM - threshold_M).abs() < BANDWIDTH / 2))
        pre_E, threshold_E = run.values(pre_BM, x_BD, run["b_enc"], at), run["threshold"][at.latents_E]
        codes_E: Tensor = _Jump.apply(pre_E, threshold_E)
        steps_E: Tensor = _Step.apply(pre_E, threshold_E)
        run.fired(at.where(steps_E.detach() > 0))
        l0 = steps_E.sum() / len(x_BD)
        warmup = min(2000, run.steps // 5) if self.sparsity_warmup is None else self.sparsity_warmup
        penalty = (l0 / self.l0 - 1).square() if self.quadratic else l0
        error = _squared_error(x_BD, decode(codes_E, self.decoder(run), run["b_dec"], at))
        return error + self.sparsity * run.warmed(warmup) * penalty

    def after_step(self, run: TrainingRun, x_BD: Tensor) -> None:
        """Keep thresholds at 0 or above."""
        run["threshold"].clamp_(min=0)

    def finished(self, run: TrainingRun) -> tuple[Architecture, dict[str, Tensor], int]:
        """Return the trained tensors and thresholds."""
        architecture, tensors, k = super().finished(run)
        return architecture, tensors | {"threshold": run["threshold"]}, k


class GatedSAE(_Untied, slug="gated_sae"):
    """Train an autoencoder with a gate and a magnitude for each latent.

        q = W_enc (x - b_dec),   gate = 1[q + b_gate > 0],   z = gate ReLU(exp(r_mag) q + b_mag)
        loss = ||r||² + λ ||ReLU(q + b_gate)||₁ + ||x - x̂(ReLU(q + b_gate))||²

    The last term decodes with a frozen copy of the decoder, so that it trains the gate alone.

    Args:
        l1: λ. Default 0.05.
        l1_warmup: share of the steps in which λ rises. Default 0.05.

    Source: Rajamanoharan et al., Improving Dictionary Learning with Gated Sparse Autoencoders, 2024, arXiv 2404.16014.
    """

    kinds = ("dictionary",)
    summary = "trains a dictionary with a gate and a magnitude for each latent"
    architecture = "gated"

    l1: Annotated[float, Field(ge=0)] = 0.05
    l1_warmup: Annotated[float, Field(ge=0, le=1)] = 0.05

    def new_parameters(self, inputs: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the untied start with the biases of both paths."""
        start = super().new_parameters(inputs, generator)
        del start["b_enc"]
        return start | {name: torch.zeros(self.width) for name in ("b_gate", "b_mag", "r_mag")}

    def loss(self, run: TrainingRun, x_BD: Tensor) -> Tensor:
        """Return both squared errors and the penalty."""
        pre_BM = run.pre(x_BD, bias=run["b_gate"])
        at = ActiveEntries.from_mask(pre_BM > 0)
        gate_E = run.values(pre_BM, x_BD, run["b_gate"], at)
        gate_bias_E, magnitude_bias_E = run["b_gate"][at.latents_E], run["b_mag"][at.latents_E]
        magnitude_E = (gate_E - gate_bias_E) * run["r_mag"][at.latents_E].exp() + magnitude_bias_E
        run.fired(at)
        error = _squared_error(x_BD, decode(torch.relu(magnitude_E), self.decoder(run), run["b_dec"], at))
        frozen_BD = decode(gate_E, run["W_dec"].detach(), run["b_dec"].detach(), at)
        weight = self.l1 * run.warmed(round(self.l1_warmup * run.steps))
        return error + weight * gate_E.sum() / len(x_BD) + _squared_error(x_BD, frozen_BD)

    def finished(self, run: TrainingRun) -> tuple[Architecture, dict[str, Tensor], int]:
        """Return the trained tensors."""
        names = ("W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
        return self.architecture, {"W_enc": run["W_enc"].T, **{name: run[name] for name in names}}, 0
