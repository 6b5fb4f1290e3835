"""The core of BiP: a model whose weights are masked by the top-k of learned scores, and the gradient of the scores.

Dimension letters: none; every tensor here has the shape of the weight that it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from intaglio.errors import IntaglioError
from intaglio.methods.weights.bip.layers import KINDS, Kind, Layer, Units, find_layers, find_units
from intaglio.methods.weights.bip.masks import Scope, magnitude_masks, overlap, unit_masks
from intaglio.methods.weights.masks import as_numbers

Implicit = bool | Literal["released"]
Schedule = Literal["step", "cosine", "constant"]


def masked(weight: Tensor, kept: Tensor) -> Tensor:
    """m * weight, with no gradient of its own.

    Args:
        weight: finite values.
        kept: m, True = kept.
    """
    # Made anew each time: kept as numbers, masks would take four times the memory.
    return as_numbers(kept, weight.dtype).mul_(weight)


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
    """The upper level's gradient G = theta * g - (1/gamma) g * (m * g).

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


def gradients_at(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """g = dl/dz by name; None where the loss does not depend on it.

    Args:
        loss: computed within `Scored.probing`.
        leaves: z.
    """
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def rate_at(schedule: Schedule, share: float) -> float:
    """The factor on the scores' learning rate.

    Args:
        schedule: `step`: 1, from 75 % on 0.1, from 90 % on 0.01, as in the paper's code; `cosine` to 0; `constant`.
        share: of the steps that are done, 0 to 1.
    """
    if schedule == "step":
        return 1.0 if share < 0.75 else 0.1 if share < 0.9 else 0.01
    return 0.5 * (1 + float(torch.cos(torch.tensor(share * torch.pi)))) if schedule == "cosine" else 1.0


class Masked(nn.Module):
    """The parametrization z = m * theta; `probe`, while set, stands in the place of z so that dl/dz can be asked for.

    Args:
        kept: m, True = kept.
    """

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept
        self.probe: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Return z.

        Args:
            weight: theta.
        """
        if self.probe is not None:
            return self.probe
        z: Tensor = _Product.apply(weight, self.kept)
        return z


@dataclass(frozen=True)
class Report:
    """What a pruned model came to.

    Args:
        kept: weights kept, by layer.
        total: weights, by layer.
        rescued: layers that would have been emptied by the global ranking and kept their largest score.
        overlap: intersection over union of the mask with the one at the beginning, that of magnitude.
        passes: forward-backward passes that were taken.
    """

    kept: Mapping[str, int]
    total: Mapping[str, int]
    rescued: tuple[str, ...]
    overlap: float
    passes: int = 0

    @property
    def sparsity(self) -> float:
        """The share of zeros among the weights that were ranked."""
        return 1 - sum(self.kept.values()) / sum(self.total.values())


class Scored:
    """A model under masks that follow from scores; made by `BilevelPruner` and by the shaper.

    Args:
        model: changed in place until `finalize`: its ranked weights are parametrized.
        keep: share kept.
        kind: see `find_units`.
        scope: see `magnitude_masks`; units are always ranked layer by layer.
        gamma: see `upper_gradient`.
        implicit: True: the formula; False: without its second term; `released`: the term of the released code, the
            square of the score's own gradient.
        normalise: see `BiP`.
        clip: see `BiP`.
        momentum: of the scores' SGD.
        tied: whether scores and weights share their storage, as in the released code by mistake.
        guard: see `magnitude_masks`.
        p: of the norm of units.
        ignore: layers left alone.

    Raises:
        IntaglioError: a setting is out of range, or the model has nothing to prune, a tied or a frozen weight.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: float,
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
        _check(keep, kind, scope, gamma, normalise, clip, p)
        self.model, self.keep, self.scope, self.gamma, self.implicit = model, keep, scope, gamma, implicit
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
        masks = self._ranked()
        self.first = masks
        self._hooks: dict[str, Masked] = {}
        self._order = {name: tuple(module._parameters) for name, module in self.modules.items()}
        for name, module in self.modules.items():
            self._hooks[name] = Masked(masks[name])
            parametrize.register_parametrization(module, "weight", self._hooks[name])

    @torch.no_grad()
    def _ranked(self) -> dict[str, Tensor]:
        scores = {name: score.detach() for name, score in self.scores.items()}
        if not _finite(list(scores.values())):
            raise IntaglioError("a score is not finite, so weights cannot be ranked by it; lower the scores' rate")
        if self.units:
            return unit_masks(scores, self.units, self.keep, self.p)
        masks, self.rescued = magnitude_masks(scores, self.layers, self.keep, self.scope, guard=self.guard)
        return masks

    def refresh(self) -> None:
        """Rank the scores and set the masks."""
        for name, mask in self._ranked().items():
            self._hooks[name].kept = mask

    @property
    def masks(self) -> dict[str, Tensor]:
        """m of each weight, True = kept; by the name of the module that stores it."""
        return {name: hook.kept for name, hook in self._hooks.items()}

    @torch.no_grad()
    def restart(self, keep: float | None = None) -> None:
        """Score anew by magnitude what is still kept: what is pruned stays so.

        Args:
            keep: share kept from now on. Default: as before.
        """
        self.keep = self.keep if keep is None else keep
        for name, score in self.scores.items():
            score.copy_(masked(self.weights[name], self._hooks[name].kept))
        self.optimizer.state.clear()
        self.refresh()

    @contextmanager
    def probing(self) -> Iterator[dict[str, Tensor]]:
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
        """Step the scores, s <- s - rate * sign(s) * G (with momentum), and rank them anew.

        Args:
            gradients: g = dl/dz by name; None: the weight took no part. Emptied on the way, for the memory.
            rate: the scores' learning rate beta.

        Raises:
            IntaglioError: a gradient is not finite.
        """
        if not _finite([g for g in gradients.values() if g is not None]):
            raise IntaglioError("the gradient of the scores is not finite; lower the learning rates, or clip")
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

    def report(self, passes: int = 0) -> Report:
        """What is kept now.

        Args:
            passes: forward-backward passes that were taken.
        """
        masks = self.masks
        if self.units:
            kept = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
            total = {name: mask.numel() for name, mask in masks.items()}
        else:
            kept = {layer.name: int(layer.of(masks[layer.tensor]).count_nonzero()) for layer in self.layers}
            total = {layer.name: layer.of(masks[layer.tensor]).numel() for layer in self.layers}
        return Report(kept, total, self.rescued, overlap(masks, self.first), passes)

    def state_dict(self) -> dict[str, Any]:
        """Scores and their momentum."""
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
        """Put back what `state_dict` gave, and rank.

        Args:
            state: scores and momentum.
        """
        for name, score in self.scores.items():
            score.copy_(state["scores"][name])
            if name in state["momentum"]:
                self.optimizer.state[score]["momentum_buffer"] = state["momentum"][name].to(score.device)
        self.refresh()

    def bake(self) -> None:
        """Write m * theta into the weights and leave the model as it was built."""
        for name, module in self.modules.items():
            parametrize.remove_parametrizations(module, "weight")
            # The product leaves -0 in the place of pruned negative weights.
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
        raise IntaglioError(f"{name} is a {type(weight.data).__name__}, spread over processes; bip needs whole weights")
    if not weight.is_floating_point() or weight.dtype.itemsize < 4:
        raise IntaglioError(f"{name} is {weight.dtype}, too coarse to learn masks of; load the model with float32")
    if not weight.requires_grad:
        raise IntaglioError(f"{name} is frozen, and bip retrains the weights that it masks; leave freeze out")


def _check(keep: float, kind: str, scope: str, gamma: float, normalise: bool, clip: float | None, p: float) -> None:
    if not 0 < keep <= 1:
        raise IntaglioError(f"keep is {keep}; a share above 0 and at most 1 is needed")
    if kind not in KINDS:
        raise IntaglioError(f"kind is {kind!r}; accepted: {', '.join(KINDS)}")
    if scope not in ("global", "layer"):
        raise IntaglioError(f"scope is {scope!r}; accepted: global, layer")
    if not gamma > 0:
        raise IntaglioError(f"gamma is {gamma}; it must be above 0")
    if clip is not None and (normalise or not clip > 0):
        raise IntaglioError(f"clip is {clip}; it must be above 0, and is of no use with normalise")
    if not p >= 1:
        raise IntaglioError(f"p is {p}; a norm of at least 1 is needed")
