"""Prunable layers of plain modules, and weights that no mask may touch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from intaglio.errors import IntaglioError
from intaglio.methods.weights.sparsity_target import not_ignored

PRUNABLE = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prunable_layers(model: nn.Module, ignore: Sequence[str] = ()) -> list[tuple[str, nn.Module]]:
    """Return the linear layers and convolutions of any module that `ignore` does not name, in order."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PRUNABLE)]
    if not layers:
        raise IntaglioError(f"{type(model).__name__} has no linear layer and no convolution, so there is none to prune")
    chosen = [layers[index] for index in not_ignored([name for name, _ in layers], ignore)]
    refuse_shared(model, chosen)
    return chosen


def refuse_shared(model: nn.Module, layers: Sequence[tuple[str, nn.Module]]) -> None:
    """Refuse weights that another module shares: masked here, they would stay dense there."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    for name, module in layers:
        if parametrize.is_parametrized(module, "weight") or not isinstance(module.weight, nn.Parameter):
            raise IntaglioError(f"{name}.weight is parametrized already; remove that before pruning")
        others = owners.get(id(module.weight), set()) - {f"{name}.weight"}
        if others:
            raise IntaglioError(
                f"{name}.weight is tied to {min(others)}; name it in ignore, or untie the two before pruning"
            )
