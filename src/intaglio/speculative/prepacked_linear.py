"""Linears with their weights laid out beforehand, so that a pass over a few tokens costs little more than one over one.

On a CPU the usual matrix product lays the weight out anew in each call, which one row does not need and many rows pay
back; from two to some hundred rows, those of a drafted tree, it is most of the time. oneDNN takes weights in its own
layout. A linear of a model gets such a copy the first time that it is called in a run, and is called with it during the
passes of the loop alone; the weights themselves stay as they are. On one core of an AMD EPYC, float32: the product of 4
tokens with SmolLM2's 49,152 x 576 head takes 6 ms in the place of 18 to 21, that of 16 takes 11 in the place of 25.

The two operators are those that torch's own inductor calls for frozen weights; without them models are run as ever.
Copies are kept for the next run, as long as the module lives. The sums run in another order, so the last bits differ,
as they do between a pass over one token and one over several.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MOST = 256
"""Rows of a product that is taken from the copy; the usual one is as good for more."""
WORTH = 32
"""New tokens of a run from which on the copies are made without being asked for: they take as long as some passes."""
_EXPECTED = 16
"""Rows that the layout is chosen for."""
_LEAST = 4
"""Rows of a product at the least, by rows of zeros: oneDNN takes less time for four than for one to three."""
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class _Copy:
    """The copy of a module's weight.

    Args:
        weight_IO: in oneDNN's layout.
        probe_O: what the weight gave for a fixed vector. Another outcome tells that the weight has changed; its version
            would not, since `weight.data` has one of its own.
    """

    weight_IO: Tensor
    probe_O: Tensor


_COPIES: WeakKeyDictionary[nn.Module, _Copy] = WeakKeyDictionary()


class Prepacked:
    """The linears of a model, called from their copies inside of this context, without gradients.

    A thread that leaves the context while another is in it ends it for both: the other's pass then goes on with the
    weights themselves.

    Args:
        model: on a CPU, in float32 or bfloat16; what else it has is called as ever.
    """

    def __init__(self, model: nn.Module) -> None:
        self._forwards = [
            (module, partial(_forward, module)) for module in model.modules() if _is_usable(module)
        ]  # fmt: skip
        for module, _ in self._forwards:
            copy = _COPIES.get(module)
            if copy is not None and not torch.equal(copy.probe_O, _probe(module)):
                del _COPIES[module]

    def __enter__(self) -> None:
        for module, forward in self._forwards:
            # Straight into the instance: a module takes attributes slowly, and this happens in every pass.
            module.__dict__["forward"] = forward

    def __exit__(self, *_: Any) -> None:
        for module, _forward in self._forwards:
            module.__dict__.pop("forward", None)


def _is_usable(module: Any) -> bool:
    if type(module) not in (nn.Linear, Conv1D):
        return False
    # A module with a forward of its own was changed by someone else: theirs wins.
    there = module.__dict__.get("forward")
    weight = module.weight
    return (
        (there is None or (isinstance(there, partial) and there.func is _forward))
        and (weight.device.type, weight.layout) == ("cpu", torch.strided)
        and weight.dtype in _DTYPES
    )


def _rows(module: Any) -> Tensor:
    """The weight [O, I]."""
    weight: Tensor = module.weight.detach()
    return weight if type(module) is nn.Linear else weight.T


@torch.no_grad()
def _probe(module: Any) -> Tensor:
    rows_OI = _rows(module).float()
    draws = torch.Generator().manual_seed(0)
    return rows_OI @ torch.rand(rows_OI.shape[1], generator=draws).add_(0.5)


def _forward(module: Any, x: Tensor) -> Tensor:
    """The module's own forward, from its copy where that is the faster and right."""
    if torch.is_grad_enabled() or x.dtype != module.weight.dtype or x.numel() > MOST * x.shape[-1]:
        stock: Tensor = type(module).forward(module, x)
        return stock
    shape, copy = x.shape[:-1], _COPIES.get(module)
    if copy is None:
        laid_out = torch.ops.mkldnn._reorder_linear_weight(_rows(module).contiguous(), _EXPECTED)
        copy = _COPIES[module] = _Copy(laid_out, _probe(module))
    rows = x.numel() // x.shape[-1]
    if rows < _LEAST:
        x = nn.functional.pad(x.reshape(rows, -1), (0, 0, 0, _LEAST - rows))
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, copy.weight_IO, module.bias, "none", [], "")
    return found if rows >= _LEAST else found[:rows].reshape(*shape, -1)


@lru_cache(maxsize=1)
def _works() -> bool:
    """Whether this torch has the two operators, with these arguments: they are inductor's, and no promise is made."""
    draws = torch.Generator().manual_seed(0)
    x_BI, weight_OI = torch.rand(3, 8, generator=draws), torch.rand(5, 8, generator=draws)
    try:
        copy_IO = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _EXPECTED)
        found_BO = torch.ops.mkldnn._linear_pointwise(x_BI, copy_IO, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(found_BO, x_BI @ weight_OI.T, atol=1e-5)


def prepacked(model: nn.Module, wanted: bool | None, tokens: int) -> Prepacked | None:
    """The context for the passes of a run; None: the model is called as it is.

    Args:
        model: to be run.
        wanted: True: wherever it can be done. False: never. None: if the run may emit at least 32 tokens and the copies
            take at most half of the memory that is free.
        tokens: most new tokens of the run.
    """
    if wanted is False or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and _works()):
        return None
    if wanted is None:
        fresh = [module for module in model.modules() if _is_usable(module) and module not in _COPIES]
        missing = sum(_rows(module).nbytes for module in fresh)
        if tokens < WORTH or missing > psutil.virtual_memory().available // 2:
            return None
    return Prepacked(model)
