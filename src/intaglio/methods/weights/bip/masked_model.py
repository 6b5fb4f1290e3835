"""Score-masked model: weights masked by the top-k of learned scores, and the gradient of the scores.

Every tensor here has the shape of the weight that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from intaglio.errors import DivergedError, IntaglioError
from intaglio.methods.weights.bip.masks import Scope, magnitude_masks, unit_masks
from intaglio.methods.weights.bip.prunable_units import Kind, Layer, Units, find_layers, find_units
from intaglio.methods.weights.sparsity_target import mask_to_float

Implicit = bool | Literal["released"]
ScoreSchedule = Literal["step", "cosine", "constant"]


def masked(weight: Tensor, kept: Tensor) -> Tensor:
    """Return m * weight for finite weights, with no gradient of its own."""
    # Computed each time: stored as numbers, masks would take four times the memory.
    return mask_to_float(kept, weight.dtype).mul_(weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return masked(weight, kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return masked(gradient, kept), None


def upper_gradient(theta: Tensor, g: Tensor, mask: Tensor, gamma: float, *, implicit: bool = True) -> Tensor:
    """Return the upper level's gradient G = theta * g - (1/gamma) g * (m * g).

    At the lower level's optimum m * g + gamma * theta = 0; differentiated without the Hessian it gives
    d theta / d m = -(1/gamma) diag(g), and the chain rule G = dl/dm + (d theta / d m) (dl / d theta).

    Args:
        theta: weights.
        g: dl/dz at z = m * theta.
        mask: m, True = kept.
        gamma: of the lower level's (gamma/2) ||theta||^2.
        implicit: False leaves the second term out: plain alternation, and the limit of a large gamma. Default True.

    Returns:
        G, in the same shape.
    """
    direct = theta * g
    return direct.sub_(masked(g.square(), mask).div_(gamma)) if implicit else direct


def score_gradients(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Return g = dl/dz by name for a loss computed within `gradient_probe`; None where it does not depend on z."""
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, gradients, strict=True))


def score_rate(schedule: ScoreSchedule, share: float) -> float:
    """Return the factor on the scores' learning rate after a share of the steps.

    `step` is 1, from 75 % on 0.1, from 90 % on 0.01, as in the paper's code; `cosine` falls to 0.
    """
    if schedule == "step":
        return 1.0 if share < 0.75 else 0.1 if share < 0.9 else 0.01
    return 0.5 * (1 + math.cos(share * math.pi)) if schedule == "cosine" else 1.0


class Masked(nn.Module):
    """The parametrization z = m * theta; `probe`, while set, replaces z to give dl/dz."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept
        self.probe: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Return z."""
        if self.probe is not None:
            return self.probe
        z: Tensor = _Product.apply(weight, self.kept)
        return z


class MaskedModel:
    """A model under masks that follow from scores. The ranked weights are parametrized until `bake`.

    The settings are those of `BiP`, which validates them.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        *,
        kind: Kind = "unstructured",
        scope: Scope = "global",
        gamma: float = 1.0,
        implicit: Implicit = True,
        normalise: bool = False,
        clip: float | None = None,
        momentum: float = 0.9,
        tied: bool = False,
        guard: bool = True,
        p: float = 2.0,
        ignore: Sequence[str] = (),
    ) -> None:
        self.sparsity, self.scope, self.gamma, self.implicit = sparsity, scope, gamma, implicit
        self.normalise, self.clip, self.tied, self.guard, self.p = normalise, clip, tied, guard, p
        self.layers: list[Layer] = find_layers(model, ignore) if kind == "unstructured" else []
        self.units: list[Units] = find_units(model, kind, ignore) if kind != "unstructured" else []
        self.rescued: tuple[str, ...] = ()
        members = [member for units in self.units for member in units.members]
        self.modules: dict[str, nn.Module] = {layer.tensor: layer.module for layer in self.layers}
        self.modules |= {member.tensor: member.module for member in members}
        for name, module in self.modules.items():
            _check_weight(f"{name}.weight", module.weight)  # type: ignore[arg-type]
        self.weights: dict[str, Tensor] = {name: m.weight for name, m in self.modules.items()}  # type: ignore[misc]
        self.scores: dict[str, nn.Parameter] = {}
        for name, weight in self.weights.items():
            data = weight.detach() if tied else weight.detach().clone()
            self.scores[name] = nn.Parameter(data)
        self.optimizer = torch.optim.SGD(self.scores.values(), lr=1.0, momentum=momentum, weight_decay=0.0)
        self.first = self._ranked()
        self._hooks: dict[str, Masked] = {}
        self._order = {name: tuple(module._parameters) for name, module in self.modules.items()}
        for name, module in self.modules.items():
            self._hooks[name] = Masked(self.first[name])
            parametrize.register_parametrization(module, "weight", self._hooks[name])

    @torch.no_grad()
    def _ranked(self) -> dict[str, Tensor]:
        scores = {name: score.detach() for name, score in self.scores.items()}
        if not _finite(list(scores.values())):
            raise DivergedError("a score is not finite, so weights cannot be ranked by it; lower the scores' rate")
        if self.units:
            return unit_masks(scores, self.units, self.sparsity, self.p)
        masks, self.rescued = magnitude_masks(scores, self.layers, self.sparsity, self.scope, guard=self.guard)
        return masks

    def refresh(self) -> None:
        """Rank the scores and set the masks."""
        for name, mask in self._ranked().items():
            self._hooks[name].kept = mask

    @property
    def masks(self) -> dict[str, Tensor]:
        """m of each weight, True = kept, by the name of the module that stores it."""
        return {name: hook.kept for name, hook in self._hooks.items()}

    @contextmanager
    def gradient_probe(self) -> Iterator[dict[str, Tensor]]:
        """Put z = m * theta into the model as leaves, so that one backward gives dl/dz and touches nothing else."""
        if self.tied:
            self.refresh()
        with torch.no_grad():
            leaves = {n: masked(self.weights[n], hook.kept) for n, hook in self._hooks.items()}
        for name, hook in self._hooks.items():
            hook.probe = leaves[name].requires_grad_()
        try:
            yield leaves
        finally:
            for hook in self._hooks.values():
                hook.probe = None

    @torch.no_grad()
    def learn(self, gradients: dict[str, Tensor | None], rate: float) -> None:
        """Step the scores, s <- s - rate * sign(s) * G (with momentum), and rank them; empties `gradients`."""
        if not _finite([g for g in gradients.values() if g is not None]):
            raise DivergedError("the gradient of the scores is not finite; lower the learning rates, or clip")
        for name, score in self.scores.items():
            g = gradients.pop(name)
            score.grad = None if g is None else self._score_gradient(name, g)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.refresh()

    def _score_gradient(self, name: str, g: Tensor) -> Tensor:
        theta, score, kept = self.weights[name].detach(), self.scores[name].detach(), self._hooks[name].kept
        if self.normalise:
            # As at the lower level's optimum for gamma = 1, where |g| = |theta|: the scale of the loss drops out.
            power = masked(theta, kept).square().sum() / kept.count_nonzero().clamp(min=1)
            g = g * (power / g.square().mean().clamp(min=torch.finfo(g.dtype).tiny)).sqrt()
        elif self.clip is not None:
            g = g * (self.clip / g.norm().clamp(min=self.clip))
        if self.implicit == "released":
            own = theta * g * score.sign()
            return own - own * own / self.gamma
        return upper_gradient(theta, g, kept, self.gamma, implicit=self.implicit).mul_(score.sign())

    def state_dict(self) -> dict[str, Any]:
        """Return the scores and their momentum."""
        momentum = {
            name: self.optimizer.state[score].get("momentum_buffer")
            for name, score in self.scores.items()
            if score in self.optimizer.state
        }
        return {
            "scores": {name: score.detach() for name, score in self.scores.items()},
            "momentum": {name: buffer for name, buffer in momentum.items() if buffer is not None},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore scores and momentum, and rank."""
        for name, score in self.scores.items():
            score.copy_(state["scores"][name])
            if name in state["momentum"]:
                self.optimizer.state[score]["momentum_buffer"] = state["momentum"][name].to(score.device)
        self.refresh()

    def bake(self) -> None:
        """Write m * theta into the weights and leave the model as it was built."""
        for name, module in self.modules.items():
            parametrize.remove_parametrizations(module, "weight")
            # The product leaves -0 for pruned negative weights.
            module.weight.data.masked_fill_(~self._hooks[name].kept, 0)  # type: ignore[operator]
            # The weight comes back as the last parameter; where it was, optimizers by position find it again.
            own = module._parameters
            module._parameters = {key: own[key] for key in (*self._order[name], *own) if key in own}
        self._hooks.clear()


def _finite(tensors: Sequence[Tensor]) -> bool:
    # One transfer for all: on a GPU each waits for the device.
    return not tensors or bool(torch.isfinite(torch.stack([tensor.abs().amax() for tensor in tensors])).all())


def _check_weight(name: str, weight: Tensor) -> None:
    if type(weight.data) is not Tensor:
        raise IntaglioError(f"{name} is a {type(weight.data).__name__}, sharded; bip needs whole weights")
    if not weight.is_floating_point() or weight.dtype.itemsize < 4:
        raise IntaglioError(f"{name} is {weight.dtype}, too coarse to learn masks of; load the model with float32")
    if not weight.requires_grad:
        raise IntaglioError(f"{name} is frozen, and bip retrains the weights that it masks; leave freeze out")
