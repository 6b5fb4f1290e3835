"""CATS, a baseline (Lee et al., Contextually-Aware Thresholding for Sparsity in Large Language Models, COLM 2024).

    y = down(T(act(gate x)) * (up x)),   T(a) = a where |a| > threshold, else 0

A unit of the feed-forward whose gate is small is off: a token need read neither its row of `up` nor its column of
`down`. Gates and attention are read whole. Of the two halves, `down` is gathered here; `up` is multiplied whole.

Dimension letters: N tokens, U units.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.errors import IntaglioError
from intaglio.methods.activations.r_sparse.linear import Rule
from intaglio.methods.activations.r_sparse.surgery import Layer
from intaglio.methods.activations.r_sparse.thresholds import scores, thresholds
from intaglio.modeling.anatomy import Anatomy, Linear
from intaglio.modeling.replacement import module_names

EXACT: Layer = (Rule(0.0, scaled=False), None)
"""What `down` becomes: a layer that leaves out the units that are off, and nothing else."""


@dataclass(frozen=True, eq=False)
class Gated:
    """One gated feed-forward.

    Args:
        gate: the full name of its gate.
        up: of its up projection.
        down: of its down projection.
        linear: the gate.
        activation: where its activation function stands, as `model.get_submodule` takes it.
    """

    gate: str
    up: str
    down: str
    linear: Linear
    activation: str


def gated(parts: Anatomy, names: Collection[str]) -> dict[str, Gated]:
    """The gated feed-forwards whose three projections are among some names, by the names of their gates.

    Args:
        parts: of the model.
        names: of projections that take part.

    Raises:
        IntaglioError: there is none, or the activation function of one cannot be told.
    """
    places, found = module_names(parts.model), {}
    for index in range(len(parts.blocks)):
        roles = {linear.role: linear for linear in parts.linears(index)}
        if not {"gate", "up", "down"} <= roles.keys():
            continue
        gate, up, down = (f"layers.{index}.{roles[role].name}" for role in ("gate", "up", "down"))
        if not {gate, up, down} <= set(names):
            continue
        owner = places[id(roles["down"].module)].rpartition(".")[0]
        functions = [
            name
            for name, child in parts.model.get_submodule(owner).named_children()
            if "act" in name and not any(True for _ in child.parameters())
        ]
        if len(functions) != 1:
            raise IntaglioError(f"the activation function of {owner} cannot be told, so cats cannot cut it")
        found[gate] = Gated(gate, up, down, roles["gate"], f"{owner}.{functions[0]}")
    if not found:
        raise IntaglioError("how is cats, which needs gate, up and down projections, and no block has them all to give")
    return found


def units_off(sparsity: float, shapes: Mapping[str, tuple[int, int]], found: Collection[Gated]) -> float:
    """The share of units that must be off so that a token does not read a share of all weights.

    Args:
        sparsity: of the weights of all projections that take part.
        shapes: (outputs, inputs) of each of them.
        found: the feed-forwards.

    Raises:
        IntaglioError: their up and down projections have too few weights.
    """
    size = {name: outputs * inputs for name, (outputs, inputs) in shapes.items()}
    most = sum(size[one.up] + size[one.down] for one in found) / sum(size.values())
    if sparsity >= most:
        raise IntaglioError(
            f"sparsity is {sparsity:g}, and cats leaves out less than {most:.3g} of these weights, as it reads gates "
            "and attention whole"
        )
    return sparsity / most


def cut(one: Gated, function: nn.Module, x_NI: Tensor, off: float) -> float:
    """The threshold that turns a share of the units off on the calibration tokens.

    Args:
        one: the feed-forward.
        function: its activation.
        x_NI: what enters the gate.
        off: the share.
    """
    gate_NU = F.linear(x_NI, one.linear.read(), one.linear.read_bias())
    return thresholds(scores(function(gate_NU), None), [1 - off])[0]


__all__ = ["EXACT", "Gated", "cut", "gated", "units_off"]
