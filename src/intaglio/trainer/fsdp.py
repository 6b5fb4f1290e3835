"""FSDP helpers: gather sharded tensors for saving, shard them again when they are loaded.

FSDP2 replaces each parameter by a `DTensor` and swaps the class of the modules that it shards. It has no way back, and
a checkpoint must end with plain tensors in stock modules.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(value: Tensor) -> Tensor:
    """Return the whole of a tensor; every process must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard a plain tensor, the same in all processes, as another one is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2 has sharded a module or one inside it."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


@torch.no_grad()
def unshard(module: nn.Module) -> None:
    """Restore whole parameters and stock classes in a module that FSDP2 has sharded; every process must call it."""
    whole: dict[int, nn.Parameter] = {}
    kept: list[nn.Parameter] = []  # so that no id is used twice
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if isinstance(parameter, DTensor):
                if id(parameter) not in whole:
                    kept.append(parameter)
                    whole[id(parameter)] = nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
                part._parameters[name] = whole[id(parameter)]
    for part in list(module.modules()):
        if isinstance(part, FSDPModule):
            state = part._get_fsdp_state()
            for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
                handle.remove()
            # fully_shard made the class from FSDPModule and the module's own.
            part.__class__ = type(part).__bases__[1]
