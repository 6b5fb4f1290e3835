"""GBASAE (Chen et al. 2026): a sparse dictionary whose biases follow target firing frequencies, without a penalty.

Dimension letters: B batch, D width, M latents, K groups, E active entries.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from intaglio.dictionaries.active_entries import ActiveEntries, decode
from intaglio.dictionaries.dictionary import Architecture
from intaglio.dictionaries.sparse_autoencoder import SparseAutoencoder
from intaglio.dictionaries.training import TrainingRun, unit_rows

LEARNING_RATE = 1e-3
LOWEST_BIAS = -1.0
"""Biases stay between this and 0; inputs have a mean squared norm of 1."""


def target_frequencies(highest: float, lowest: float, groups: int) -> Tensor:
    """Return the target firing frequency of each group [K], in geometric steps from the highest to the lowest."""
    return torch.from_numpy(np.geomspace(highest, lowest, groups)).double()


def group_of_latents(width: int, groups: int) -> Tensor:
    """Return the group of each latent, int64 [M]; groups are of equal size, the first ones larger by one if need be."""
    parts = torch.arange(width).tensor_split(groups)
    return torch.cat([torch.full((len(part),), index) for index, part in enumerate(parts)])


def adapted_biases(
    bias_M: Tensor,
    frequency_M: Tensor,
    peak_M: Tensor,
    target_M: Tensor,
    group_M: Tensor,
    *,
    step_down: float,
    step_up: float,
    min_frequency: float,
) -> Tensor:
    """Return biases [M] after one adaptation.

    Args:
        bias_M: biases, between -1 and 0.
        frequency_M: share of samples with a positive pre-activation.
        peak_M: highest pre-activation of each latent, at least 0.
        target_M: target frequency of each latent's group.
        group_M: int64, group of each latent.
        step_down: γ₋, of the decrease of latents above their target.
        step_up: γ₊, of the increase of latents that never fire.
        min_frequency: ε, frequency below which a latent never fires.
    """
    groups = int(group_M.max()) + 1
    positive_M = peak_M > 0
    sums_K = peak_M.new_zeros(groups).index_add_(0, group_M, peak_M.clamp_min(0))
    counts_K = peak_M.new_zeros(groups).index_add_(0, group_M, positive_M.to(peak_M))
    mean_M = (sums_K / counts_K.clamp_min(1))[group_M]
    lowered_M = (bias_M - step_down * peak_M).clamp_min(LOWEST_BIAS)
    raised_M = (bias_M + step_up * mean_M).clamp_max(0)
    changed_M = torch.where(frequency_M < min_frequency, raised_M, bias_M)
    return torch.where(frequency_M > target_M, lowered_M, changed_M)


class GBASAE(SparseAutoencoder, slug="gba_sae"):
    """Train a dictionary on a model's activations by group bias adaptation.

    With tied rows w_m of norm 1, scales a_m, and inputs x of mean squared norm 1 around b_dec:

        y_m = w_m · (x - b_dec) + b_m
        z_m = a_m w_m · (x - b_dec) where y_m > 0, else 0          (`relu`: a_m ReLU(y_m))
        x̂ = Σ_m z_m w_m + b_dec,   loss = ½ ||x̂ - x||²,            no sparsity penalty

    Gradients train w, a and b_dec. The biases receive none: every `adapt_every` steps they follow the frequencies
    p_m = mean 1[y_m > 0] and peaks r_m = max(0, max y_m) since the last adaptation. For a latent in group k with target
    frequency p_k:

        p_m > p_k:  b_m ← max(b_m - γ₋ r_m, -1)
        p_m < ε:    b_m ← min(b_m + γ₊ r̄_k, 0),   r̄_k the mean of the positive r_m of the group

    The targets fall in geometric steps from `highest_frequency` to `lowest_frequency`. One group is BA, the paper's
    single-frequency form, with the target `highest_frequency`. The result is a JumpReLU dictionary with the thresholds
    -b_m.

    The biases are clamped to absolute values, so inputs are scaled; the paper leaves the scale open. Rows return to
    norm 1 after each step; `spherical` also removes the radial part of the gradient, as in the paper's theory. The
    printed algorithm has its min and max swapped; the form above is the one that its text describes.

    Args:
        groups: K, groups of latents, each with a target frequency. Default 10.
        highest_frequency: target of the first group. Default 0.5.
        lowest_frequency: target of the last group; a single group does not use it. Default 0.001.
        step_down: γ₋, downward step of a bias as a share of the peak. Default 0.01.
        step_up: γ₊, upward step as a share of the group's mean peak. Default 0.01.
        adapt_every: optimizer steps between adaptations; a chance of 0.001 needs 10,000 activations to be seen. Default
            50.
        min_frequency: ε, frequency below which a bias is raised. Default 1e-6.
        start_scale: a_m at the start. Near 0 each row learns from the input rather than from what other rows leave of
            it, as in the paper's theory; from 1 on, rows share features out among them. Default 0.1.
        activation: `jumprelu` (default) or `relu`.
        tied: whether one matrix encodes and decodes; otherwise both have rows of norm 1, and the controller acts on the
            encoder's biases. Default true.
        spherical: whether gradients of rows lose their radial part. Default false.

    The other fields are those of every dictionary: layer, site, width, tokens, length, skip, batch_tokens, buffer,
    learning_rate (default 0.001), warmup, decay, seeds, beside.

    Raises:
        IntaglioError: more groups than latents, targets in the wrong order, or as `fit`.

    Source: Chen, Sheen, Xiong, Wang and Yang, Taming Polysemanticity in LLMs: Theory-Grounded Feature Recovery via
    Sparse Autoencoders, ICLR 2026, arXiv 2506.14002.
    """

    kinds = ("dictionary",)
    summary = "trains a sparse dictionary whose biases follow target firing frequencies, without a sparsity penalty"
    citation = (
        "Chen et al., Taming Polysemanticity in LLMs: Theory-Grounded Feature Recovery via Sparse Autoencoders, "
        "ICLR 2026"
    )
    url = "https://arxiv.org/abs/2506.14002"

    groups: Annotated[int, Field(ge=1, le=10_000)] = 10
    highest_frequency: Annotated[float, Field(gt=0, le=1)] = 0.5
    lowest_frequency: Annotated[float, Field(gt=0, le=1)] = 0.001
    step_down: Annotated[float, Field(ge=0, le=1)] = 0.01
    step_up: Annotated[float, Field(ge=0, le=1)] = 0.01
    adapt_every: Annotated[int, Field(ge=1)] = 50
    min_frequency: Annotated[float, Field(ge=0, lt=1)] = 1e-6
    start_scale: Annotated[float, Field(gt=0, le=100)] = 0.1
    activation: Literal["jumprelu", "relu"] = "jumprelu"
    tied: bool = True
    spherical: bool = False

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.groups > self.width:
            raise ValueError(f"width is {self.width} and groups is {self.groups}; a group needs at least one latent")
        if self.lowest_frequency > self.highest_frequency:
            raise ValueError(
                f"lowest_frequency is {self.lowest_frequency} and highest_frequency {self.highest_frequency}; the "
                "first may not be larger"
            )
        return self

    @classmethod
    def single(cls, frequency: float = 0.01, **fields: Any) -> Self:
        """Return BA: one group with one target frequency.

        Args:
            frequency: the target p. Default 0.01.
            fields: other fields.
        """
        return cls(groups=1, highest_frequency=frequency, lowest_frequency=frequency, **fields)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return LEARNING_RATE if self.learning_rate is None else self.learning_rate

    @property
    def unit_norm(self) -> tuple[str, ...]:  # type: ignore[override]
        """Trained matrices whose rows keep norm 1."""
        return ("W_enc",) if self.tied else ("W_enc", "W_dec")

    @property
    def projects_gradient(self) -> bool:  # type: ignore[override]
        """Whether gradients of rows lose their radial part."""
        return self.spherical

    @property
    def targets(self) -> Tensor:
        """Target frequency of each latent [M]."""
        by_group_K = target_frequencies(self.highest_frequency, self.lowest_frequency, self.groups)
        return by_group_K[group_of_latents(self.width, self.groups)]

    def new_parameters(self, inputs: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return random rows and equal scales."""
        rows_MD = unit_rows(self.width, inputs, generator)
        start = {"W_enc": rows_MD, "scale": torch.full((self.width,), self.start_scale)}
        return start if self.tied else start | {"W_dec": rows_MD.clone()}

    def new_state(self) -> dict[str, Tensor]:
        """Return biases of 0, and what is counted between adaptations."""
        zeros = torch.zeros(self.width)
        return {
            "bias": zeros,
            "positive": torch.zeros(self.width, dtype=torch.int64),
            "peak": zeros.clone(),
            "samples": torch.zeros((), dtype=torch.int64),
        }

    def loss(self, run: TrainingRun, x_BD: Tensor) -> Tensor:
        """Return half of the squared error, and count firing."""
        bias_M = run.state["bias"]
        pre_BM = run.pre(x_BD, bias=bias_M)
        at = ActiveEntries.from_mask(pre_BM > 0)
        run.fired(at)
        run.state["positive"] += torch.bincount(at.latents_E, minlength=self.width)
        run.state["peak"].copy_(torch.maximum(run.state["peak"], pre_BM.amax(0)))
        run.state["samples"] += len(x_BD)
        values_E = run.values(pre_BM, x_BD, bias_M, at)
        if self.activation == "jumprelu":
            values_E = values_E - bias_M[at.latents_E]
        reconstructed_BD = decode(
            values_E * run["scale"][at.latents_E], run["W_enc" if self.tied else "W_dec"], run["b_dec"], at
        )
        return 0.5 * (x_BD - reconstructed_BD).square().sum(1).mean()

    def after_step(self, run: TrainingRun, x_BD: Tensor) -> None:
        """Adapt the biases where it is time."""
        if run.step % self.adapt_every:
            return
        state = run.state
        state["bias"].copy_(
            adapted_biases(
                state["bias"],
                state["positive"].double() / state["samples"],
                state["peak"],
                self.targets.to(state["bias"].device),
                group_of_latents(self.width, self.groups).to(state["bias"].device),
                step_down=self.step_down,
                step_up=self.step_up,
                min_frequency=self.min_frequency,
            )
        )
        for name in ("positive", "peak", "samples"):
            state[name].zero_()

    def finished(self, run: TrainingRun) -> tuple[Architecture, dict[str, Tensor], int]:
        """Return a JumpReLU dictionary: thresholds -b, or the biases with thresholds of 0 for `relu`."""
        bias_M, zeros_M = run.state["bias"], torch.zeros_like(run.state["bias"])
        jump = self.activation == "jumprelu"
        decoder_MD = run["scale"][:, None] * run["W_enc" if self.tied else "W_dec"]
        tensors = {
            "W_enc": run["W_enc"].T,
            "W_dec": decoder_MD,
            "b_dec": run["b_dec"],
            "b_enc": zeros_M if jump else bias_M,
            "threshold": -bias_M if jump else zeros_M,
        }
        return "jumprelu", tensors, 0
