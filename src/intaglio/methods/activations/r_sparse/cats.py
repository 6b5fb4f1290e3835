"""CATS, a baseline (Lee et al., Contextually-Aware Thresholding for Sparsity in Large Language Models, COLM 2024).

    y = down(T(act(gate x)) * (up x)),   T(a) = a where |a| > threshold, else 0

A unit of the feed-forward whose gate is small is off: a token need read neither its row of `up` nor its column of
`down`. Gates and attention are read whole. Of the two halves, `down` is gathered here; `up` is multiplied whole.

Dimension letters: N tokens, I inputs, U units.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.errors import IntaglioError
from intaglio.methods.activations.r_sparse.layers import InputRule, LayerOption, ThresholdedActivation
from intaglio.methods.activations.r_sparse.thresholds import scores, thresholds
from intaglio.modeling.anatomy import Anatomy, Linear
from intaglio.modeling.replacement import module_names, replace_modules

EXACT: LayerOption = (InputRule(0.0, scaled=False), None)
"""Option of `down`: leave out the units that are off, and nothing else."""


@dataclass(frozen=True, eq=False)
class GatedMLP:
    """One gated feed-forward: the full names of `up` and `down`, its gate, the module name of its activation."""

    up: str
    down: str
    gate: Linear
    activation: str

    def threshold(self, function: nn.Module, x_NI: Tensor, off: float) -> float:
        """Return the threshold that turns a share of the units off, from the gate's calibration inputs."""
        gate_NU = F.linear(x_NI, self.gate.read(), self.gate.read_bias())
        return thresholds(scores(function(gate_NU), None), [1 - off])[0]


def gated_mlps(parts: Anatomy, names: Collection[str]) -> dict[str, GatedMLP]:
    """Return the gated feed-forwards whose three projections are all among some names, by the names of their gates.

    Raises:
        IntaglioError: there is none, or an activation function cannot be identified.
    """
    modules, mlps = module_names(parts.model), {}
    for index in range(len(parts.blocks)):
        roles = {linear.role: linear for linear in parts.linears(index)}
        if not {"gate", "up", "down"} <= roles.keys():
            continue
        gate, up, down = (f"layers.{index}.{roles[role].name}" for role in ("gate", "up", "down"))
        if not {gate, up, down} <= set(names):
            continue
        owner = modules[id(roles["down"].module)].rpartition(".")[0]
        functions = [
            name
            for name, child in parts.model.get_submodule(owner).named_children()
            if "act" in name and not any(True for _ in child.parameters())
        ]
        if len(functions) != 1:
            raise IntaglioError(f"the activation function of {owner} cannot be identified, so cats cannot cut it")
        mlps[gate] = GatedMLP(up, down, roles["gate"], f"{owner}.{functions[0]}")
    if not mlps:
        raise IntaglioError("how is cats, which needs gate, up and down projections, and no block has them all to give")
    return mlps


def unit_sparsity(sparsity: float, shapes: Mapping[str, tuple[int, int]], mlps: Collection[GatedMLP]) -> float:
    """Return the share of units to turn off so that a token does not read a share of all weights.

    Raises:
        IntaglioError: their up and down projections have too few weights.
    """
    size = {name: outputs * inputs for name, (outputs, inputs) in shapes.items()}
    most = sum(size[mlp.up] + size[mlp.down] for mlp in mlps) / sum(size.values())
    if sparsity >= most:
        raise IntaglioError(
            f"sparsity is {sparsity:g}, and cats leaves out less than {most:.3g} of these weights, as it reads gates "
            "and attention whole"
        )
    return sparsity / most


def put_thresholds(model: nn.Module, limits: Mapping[str, float]) -> None:
    """Put thresholds after activation functions, by their module names."""
    replace_modules(
        model, {name: ThresholdedActivation(model.get_submodule(name), limit) for name, limit in limits.items()}
    )
