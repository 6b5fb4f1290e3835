"""Training of sparse autoencoders on batches of activations.

    scale    s = 1 / sqrt(mean ||x - m||²), m the geometric median of the first activations; inputs are s x
    start    b_dec = s m; decoder rows of norm 1; encoder = decoder
    step     the method's loss, gradient clipping, the decoder's gradient without its part along each row, Adam,
             decoder rows back to norm 1, and what the method itself does after a step

The result is converted to the activations' own scale. Dimension letters: N, B activations, D width, M latents, E active
entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.dictionaries.active_entries import ActiveEntries, pre_activations
from intaglio.dictionaries.dictionary import Architecture, SparseDictionary
from intaglio.errors import DivergedError
from intaglio.modeling.sites import Site

MEDIAN_ROWS = 4096
"""Activations whose geometric median is taken."""
MEDIAN_STEPS = 50


def geometric_median(x_ND: Tensor) -> Tensor:
    """Return the point [D] with the least summed distance to some activations, by Weiszfeld's iteration."""
    x_ND = x_ND[:MEDIAN_ROWS].double()
    median_D = x_ND.mean(0)
    for _ in range(MEDIAN_STEPS):
        weights_N = 1 / (x_ND - median_D).norm(dim=1).clamp_min(1e-9)
        new_D = weights_N @ x_ND / weights_N.sum()
        if float((new_D - median_D).norm()) <= 1e-6 * float(new_D.norm()):
            return new_D
        median_D = new_D
    return median_D


def unit_rows(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return random directions of norm 1 [M, D]."""
    return F.normalize(torch.randn(rows, columns, generator=generator), dim=1)


class DictionaryMethod(Protocol):
    """The hyperparameters and the loss that a run needs of its method; `SparseAutoencoder` documents them."""

    slug: ClassVar[str]
    betas: ClassVar[tuple[float, float]]
    unit_norm: ClassVar[tuple[str, ...]]
    projects_gradient: ClassVar[bool]
    max_grad_norm: ClassVar[float | None]

    @property
    def width(self) -> int:
        """Latents M."""

    @property
    def tokens(self) -> int:
        """Activations in training."""

    @property
    def batch_tokens(self) -> int:
        """Activations of an optimizer step."""

    @property
    def decay(self) -> float:
        """Share of the steps, at the end, in which the rate falls to 0."""

    @property
    def rate(self) -> float:
        """The learning rate."""

    def warmup_steps(self, steps: int) -> int:
        """Return the steps in which the learning rate rises."""

    def new_parameters(self, inputs: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the trained tensors, `b_dec` excepted."""

    def new_state(self) -> dict[str, Tensor]:
        """Return the tensors that no gradient changes."""

    def loss(self, run: TrainingRun, x_BD: Tensor) -> Tensor:
        """Return the loss of a batch of scaled activations, and note which latents fired."""

    def after_step(self, run: TrainingRun, x_BD: Tensor) -> None:
        """Change parameters or state after an optimizer step."""

    def finished(self, run: TrainingRun) -> tuple[Architecture, dict[str, Tensor], int]:
        """Return the architecture, tensors and k of the dictionary, in the scale of the training."""

    def model_dump(self) -> dict[str, Any]:
        """Return the fields."""


class TrainingRun:
    """One autoencoder in training.

    Args:
        method: its hyperparameters.
        first_ND: activations that scale and offset are taken from.
        seed: of the start.
        steps: of the whole run, for schedules.
        site: of the activations. Default None.

    Attributes:
        parameters: trained tensors by name.
        state: other tensors: `silent` [M], activations since each latent fired, and the method's own.
        scale: s, the factor of inputs.
        step: finished steps.
    """

    def __init__(
        self, method: DictionaryMethod, first_ND: Tensor, seed: int, steps: int, site: Site | None = None
    ) -> None:
        self.method, self.steps, self.site, self.step = method, steps, site, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        device, inputs = first_ND.device, first_ND.shape[1]
        median_D = geometric_median(first_ND)
        spread = float((first_ND.double() - median_D).square().sum(1).mean())
        self.scale = 1 / math.sqrt(spread) if spread > 0 else 1.0
        start = method.new_parameters(inputs, self.generator) | {"b_dec": (median_D * self.scale).float()}
        self.parameters = {name: tensor.to(device).requires_grad_() for name, tensor in start.items()}
        self.state = {"silent": torch.zeros(method.width, dtype=torch.int64)} | method.new_state()
        self.state = {name: tensor.to(device) for name, tensor in self.state.items()}
        self.optimizer = torch.optim.Adam(
            self.parameters.values(), lr=method.rate, betas=method.betas, fused=device.type in ("cpu", "cuda")
        )

    def __getitem__(self, name: str) -> Tensor:
        """Return a trained tensor."""
        return self.parameters[name]

    def warmed(self, steps: int) -> float:
        """Return a factor that rises from 0 to 1 over the first steps."""
        return min(1.0, (self.step + 1) / max(steps, 1))

    @torch.no_grad()
    def pre(self, x_BD: Tensor, weight: str = "W_enc", bias: Tensor | None = None) -> Tensor:
        """Return (x - b_dec) Wᵀ + bias [B, M] without gradients."""
        weight_MD = self[weight]
        offset_M = -(weight_MD @ self["b_dec"])
        return torch.addmm(offset_M if bias is None else offset_M + bias, x_BD, weight_MD.T)

    def values(self, pre_BM: Tensor, x_BD: Tensor, bias_M: Tensor, at: ActiveEntries) -> Tensor:
        """Return the pre-activations of entries [E] with gradients."""
        return pre_activations(pre_BM, x_BD, self["W_enc"], bias_M, self["b_dec"], at)

    def fired(self, at: ActiveEntries) -> None:
        """Note the latents that were active in this step."""
        silent_M = self.state["silent"]
        silent_M += at.shape[0]
        silent_M[at.latents_E] = 0

    def update(self, x_BD: Tensor) -> float:
        """Train on a batch of activations and return its loss.

        Raises:
            DivergedError: the loss is not finite.
        """
        x_BD = x_BD * self.scale
        method = self.method
        factor = self.warmed(method.warmup_steps(self.steps)) * self._decay()
        for group in self.optimizer.param_groups:
            group["lr"] = method.rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss = method.loss(self, x_BD)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DivergedError(f"the loss of {method.slug} is not finite at step {self.step}; lower learning_rate")
        loss.backward()
        with torch.no_grad():
            for name in method.unit_norm:
                self._remove_radial(name)
            if method.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.parameters.values(), method.max_grad_norm)
            self.optimizer.step()
            for name in method.unit_norm:
                self[name].copy_(F.normalize(self[name], dim=1))
            self.step += 1
            method.after_step(self, x_BD)
        return value

    def _decay(self) -> float:
        """Return the factor of the learning rate that falls to 0 over the last share of the steps."""
        last = round(self.steps * self.method.decay)
        return 1.0 if last == 0 else min(1.0, (self.steps - self.step) / last)

    def _remove_radial(self, name: str) -> None:
        weight_MD, grad_MD = self[name], self[name].grad
        if grad_MD is not None and self.method.projects_gradient:
            grad_MD -= (grad_MD * weight_MD).sum(1, keepdim=True) * weight_MD

    @torch.no_grad()
    def dictionary(self) -> SparseDictionary:
        """Return the dictionary in the activations' own scale."""
        architecture, tensors, k = self.method.finished(self)
        scaled = {"b_dec", "b_enc", "b_gate", "b_mag", "threshold"}
        own = {
            name: (tensor.detach() / self.scale if name in scaled else tensor.detach()).clone().contiguous()
            for name, tensor in tensors.items()
        }
        return SparseDictionary(architecture, own, k=k, site=self.site)

    def alive(self, window: int) -> float:
        """Return the share of latents that fired within the last activations."""
        return float((self.state["silent"] < window).double().mean())

    def saved(self) -> dict[str, Any]:
        """Return everything that a resumed run needs."""
        adam = {
            name: self.optimizer.state[tensor]
            for name, tensor in self.parameters.items()
            if tensor in self.optimizer.state
        }
        return {
            "parameters": {name: tensor.detach() for name, tensor in self.parameters.items()},
            "state": self.state,
            "optimizer": adam,
            "scale": self.scale,
            "step": self.step,
            "generator": self.generator.get_state(),
        }

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue from a state of `saved`."""
        for name, tensor in saved["parameters"].items():
            self[name].copy_(tensor)
        for name, tensor in saved["state"].items():
            self.state[name] = tensor.to(self.state[name].device)
        for name, moments in saved["optimizer"].items():
            weight = self[name]
            self.optimizer.state[weight] = {
                key: value.to(weight.device) if value.dim() else value.clone() for key, value in moments.items()
            }
        self.scale, self.step = float(saved["scale"]), int(saved["step"])
        self.generator.set_state(saved["generator"])
