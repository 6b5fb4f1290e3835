"""Linear layers with prepacked weights, so that a pass over a few tokens costs little more than over a single token.

On a CPU the usual matrix product repacks the weight in each call, which a single row does not need and many rows pay
back; from two to some hundred rows, those of a drafted tree, it is most of the time. oneDNN accepts weights in its own
layout. A linear layer gets such a copy at its first call in a run, and uses it only during the passes of the loop; the
weights themselves are unchanged. On one core of an AMD EPYC in float32, the product of 4 tokens with SmolLM2's 49,152 x
576 head takes 6 ms instead of 18 to 21, and that of 16 tokens 11 instead of 25.

The two operators are those that torch's inductor calls for frozen weights; without them models run unchanged. Copies
are kept for the next run, as long as the module lives. Sums run in another order, so the last bits differ, as they do
between a pass over one token and over several.
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

MAX_ROWS = 256
"""Most rows of a product that uses the copy; for more, the usual product is as fast."""
MIN_NEW_TOKENS = 32
"""Fewest new tokens of a run that copies weights by default: the copies take as long as some passes."""
_LAYOUT_ROWS = 16
"""Rows that the layout is chosen for."""
_MIN_ROWS = 4
"""Products are padded to so many rows: oneDNN takes less time for four than for one to three."""
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class _Copy:
    """Copy of a module's weight.

    Args:
        weight_IO: in oneDNN's layout.
        probe_O: the weight's product with a fixed vector, which shows whether it has changed; its version would not,
            since `weight.data` has one of its own.
    """

    weight_IO: Tensor
    probe_O: Tensor


_COPIES: WeakKeyDictionary[nn.Module, _Copy] = WeakKeyDictionary()


class Prepacked:
    """Context in which the linear layers of a model use their copies, without gradients.

    Only layers on a CPU in float32 or bfloat16 do. A thread that leaves the context while another is in it ends it for
    both: the other's pass then continues with the weights themselves.
    """

    def __init__(self, model: nn.Module) -> None:
        self._forwards = [(module, partial(_forward, module)) for module in model.modules() if _is_usable(module)]
        for module, _ in self._forwards:
            copy = _COPIES.get(module)
            if copy is not None and not torch.equal(copy.probe_O, _probe(module)):
                del _COPIES[module]

    def __enter__(self) -> None:
        for module, forward in self._forwards:
            # Directly into the instance: setting attributes of a module is slow, and this happens in every pass.
            module.__dict__["forward"] = forward

    def __exit__(self, *_: Any) -> None:
        for module, _forward in self._forwards:
            module.__dict__.pop("forward", None)


def _is_usable(module: Any) -> bool:
    if type(module) not in (nn.Linear, Conv1D):
        return False
    # A module with a forward of its own was changed by other code, which wins.
    own = module.__dict__.get("forward")
    weight = module.weight
    return (
        (own is None or (isinstance(own, partial) and own.func is _forward))
        and (weight.device.type, weight.layout) == ("cpu", torch.strided)
        and weight.dtype in _DTYPES
        and _works(weight.dtype)
    )


def _rows(module: Any) -> Tensor:
    """Return the weight [O, I]."""
    weight: Tensor = module.weight.detach()
    return weight if type(module) is nn.Linear else weight.T


@torch.no_grad()
def _probe(module: Any) -> Tensor:
    rows_OI = _rows(module).float()
    draws = torch.Generator().manual_seed(0)
    return rows_OI @ torch.rand(rows_OI.shape[1], generator=draws).add_(0.5)


def _forward(module: Any, x: Tensor) -> Tensor:
    """Compute the module's forward, with its copy if that is faster and exact."""
    if torch.is_grad_enabled() or x.dtype != module.weight.dtype or x.numel() > MAX_ROWS * x.shape[-1]:
        stock: Tensor = type(module).forward(module, x)
        return stock
    shape, copy = x.shape[:-1], _COPIES.get(module)
    if copy is None:
        laid_out = torch.ops.mkldnn._reorder_linear_weight(_rows(module).contiguous(), _LAYOUT_ROWS)
        copy = _COPIES[module] = _Copy(laid_out, _probe(module))
    rows = x.numel() // x.shape[-1]
    if rows < _MIN_ROWS:
        x = nn.functional.pad(x.reshape(rows, -1), (0, 0, 0, _MIN_ROWS - rows))
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, copy.weight_IO, module.bias, "none", [], "")
    return result if rows >= _MIN_ROWS else result[:rows].reshape(*shape, -1)


@lru_cache(maxsize=len(_DTYPES))
def _works(dtype: torch.dtype) -> bool:
    """Return whether the two operators, which are inductor internals, work for a dtype on this torch and processor."""
    draws = torch.Generator().manual_seed(0)
    x_BI, weight_OI = (torch.rand(rows, 8, generator=draws).to(dtype) for rows in (3, 5))
    try:
        copy_IO = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _LAYOUT_ROWS)
        result_BO = torch.ops.mkldnn._linear_pointwise(x_BI, copy_IO, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(result_BO, x_BI @ weight_OI.T, atol=16 * torch.finfo(dtype).eps)


def prepacked(model: nn.Module, wanted: bool | None, tokens: int) -> Prepacked | None:
    """Return the context for the passes of a run of at most `tokens` new tokens; None to run the model unchanged.

    Args:
        model: the model.
        wanted: True: wherever possible. False: never. None: if the run may emit at least 32 tokens and the copies take
            at most half of the free memory.
        tokens: most new tokens of the run.
    """
    if wanted is False or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    usable = [module for module in model.modules() if _is_usable(module)]
    if not usable:
        return None
    if wanted is None:
        missing = sum(_rows(module).nbytes for module in usable if module not in _COPIES)
        if tokens < MIN_NEW_TOKENS or missing > psutil.virtual_memory().available // 2:
            return None
    return Prepacked(model)
