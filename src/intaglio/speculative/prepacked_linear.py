"""Linear layers with prepacked weights, so that a pass over a few tokens costs little more than over a single token.

On a CPU the usual matrix product repacks the weight in each call, which a single row does not need and many rows pay
back; from two to some hundred rows, those of a drafted tree, it is most of the time. oneDNN accepts weights in its own
layout. A linear layer gets such a copy at its first call in a run, and uses it only during the passes of the loop; the
weights themselves are unchanged. On one core of an AMD EPYC in float32, the product of 4 tokens with SmolLM2's 49,152 x
576 head takes 6 ms instead of 18 to 21, and that of 16 tokens 11 instead of 25. Other processors gain less or nothing,
so each shape is measured (`environment.tuning`), and the copy serves only the numbers of rows for which it is faster.

The two operators are those that torch's inductor calls for frozen weights; without them models run unchanged. Copies
are kept for the next run, as long as the module lives. Sums run in another order, so the last bits differ, as they do
between a pass over one token and over several.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import cycle
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from intaglio.environment import tuning

MAX_ROWS = 256
"""Most rows of a product that uses the copy; for more, the usual product is as fast."""
MIN_NEW_TOKENS = 32
"""Fewest new tokens of a run that copies weights by default: the copies take as long as some passes."""
_LAYOUT_ROWS = 16
"""Rows that the layout is chosen for."""
_MIN_ROWS = 4
"""Products are padded to so many rows: oneDNN takes less time for four than for one to three."""
_DTYPES = (torch.float32, torch.bfloat16)
_ROW_STEPS = (1, 4, 8, 16)
"""Rows that products are measured with; a product takes the choice of the next step, above the last one that of it."""
_BYTES = 32 << 20
"""Weights are measured in copies of so many bytes together, which no cache holds; of larger ones only some outputs."""
_MAX_COPIES = 64
_RESERVE = 0.8
"""Seconds of measuring that are left for whole passes."""

Steps = tuple[bool, ...]
"""Whether the copy is used, for each of `_ROW_STEPS`."""
_ALWAYS: Steps = (True,) * len(_ROW_STEPS)


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

    Args:
        model: the model.
        steps: choices for each usable layer; layers without any stay stock. Default: the copy always.
    """

    def __init__(self, model: nn.Module, steps: dict[nn.Module, Steps] | None = None) -> None:
        if steps is None:
            steps = dict.fromkeys(filter(_is_usable, model.modules()), _ALWAYS)
        self._forwards = [(module, partial(_forward, module, own)) for module, own in steps.items() if any(own)]
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


def _forward(module: Any, steps: Steps, x: Tensor) -> Tensor:
    """Compute the module's forward, with its copy if that is faster and exact."""
    rows = x.numel() // x.shape[-1]
    # As a module's attributes parameters are slow to find, which a product of one token notices.
    weight = module._parameters["weight"]
    if not _uses_copy(steps, rows) or torch.is_grad_enabled() or x.dtype != weight.dtype:
        if type(module) is nn.Linear:
            return nn.functional.linear(x, weight, module._parameters["bias"])
        stock: Tensor = type(module).forward(module, x)
        return stock
    copy = _COPIES.get(module)
    if copy is None:
        copy = _COPIES[module] = _Copy(_lay_out(_rows(module).contiguous()), _probe(module))
    return _product(x, copy.weight_IO, module.bias, rows)


@lru_cache(maxsize=4096)
def _uses_copy(steps: Steps, rows: int) -> bool:
    return rows <= MAX_ROWS and steps[min(bisect_left(_ROW_STEPS, rows), len(_ROW_STEPS) - 1)]


def _lay_out(weight_OI: Tensor) -> Tensor:
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _LAYOUT_ROWS)
    return laid_out


def _product(x: Tensor, weight_IO: Tensor, bias_O: Tensor | None, rows: int) -> Tensor:
    """Multiply with a copy in oneDNN's layout."""
    shape = x.shape[:-1]
    if rows < _MIN_ROWS:
        x = nn.functional.pad(x.reshape(rows, -1), (0, 0, 0, _MIN_ROWS - rows))
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_IO, bias_O, "none", [], "")
    return result if rows >= _MIN_ROWS else result[:rows].reshape(*shape, -1)


class _Weights:
    """Weights of one shape to measure with, in turn: as the layer stores them, and in oneDNN's layout."""

    def __init__(self, module: Any) -> None:
        weight = _rows(module)
        outputs, self.inputs = weight.shape
        self.dtype, self._transposed = weight.dtype, type(module) is not nn.Linear
        size = weight.element_size() * self.inputs
        self._shape = (min(outputs, max(1, _BYTES // size)), self.inputs)
        self._copies = min(_MAX_COPIES, max(1, _BYTES // (size * self._shape[0])))
        stored = " transposed" if self._transposed else ""
        self.key = f"linear {self.inputs}x{outputs}{stored} {str(self.dtype).removeprefix('torch.')}"

    def _turns(self, make: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        return cycle([make(torch.full(self._shape, 0.5, dtype=self.dtype)) for _ in range(self._copies)])

    @cached_property
    def stock(self) -> Iterator[Tensor]:
        """Weights [O, I]."""
        return self._turns(lambda weight_OI: weight_OI.T.contiguous().T if self._transposed else weight_OI)

    @cached_property
    def laid_out(self) -> Iterator[Tensor]:
        """Copies in oneDNN's layout."""
        return self._turns(_lay_out)


@torch.inference_mode()
def _tuned_steps(module: Any, tuner: tuning.Tuner) -> Steps:
    """Return the choices for a layer's shape, dtype and the threads, measured if they are not known."""
    weights, steps = _Weights(module), []
    for rows in _ROW_STEPS:
        x_BI = torch.full((rows, weights.inputs), 0.5, dtype=weights.dtype)
        calls = {
            "stock": partial(lambda x: nn.functional.linear(x, next(weights.stock)), x_BI),
            "prepacked": partial(lambda x, rows: _product(x, next(weights.laid_out), None, rows), x_BI, rows),
        }
        key = f"{weights.key} rows {rows} threads {torch.get_num_threads()}"
        steps.append(tuner.choose(key, calls, reserve=_RESERVE) == "prepacked")
    return tuple(steps)


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
        wanted: True: wherever possible. False: never. None: where it was measured to be faster, if the run may emit at
            least 32 tokens and the copies take at most half of the free memory.
        tokens: most new tokens of the run.
    """
    if wanted is False or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    usable = [module for module in model.modules() if _is_usable(module)]
    if not usable:
        return None
    if wanted:
        return Prepacked(model)
    if tokens < MIN_NEW_TOKENS:
        return None
    steps = choices(usable)
    used = [module for module in usable if any(steps[module])]
    missing = sum(_rows(module).nbytes for module in used if module not in _COPIES)
    if not used or missing > psutil.virtual_memory().available // 2:
        return None
    return Prepacked(model, steps)


def choices(modules: Iterable[nn.Module]) -> dict[nn.Module, Steps]:
    """Return for each usable layer with how many rows its copy is used."""
    tuner = tuning.tuner()
    usable = [module for module in modules if _is_usable(module)]
    if tuner is None:
        return dict.fromkeys(usable, _ALWAYS)
    by_shape: dict[Any, Steps] = {}
    steps: dict[nn.Module, Steps] = {}
    # The widest weights first: where there is no time for all, they matter most.
    for module in sorted(usable, key=lambda module: -_rows(module).numel()):
        key = (type(module), _rows(module).shape, _rows(module).dtype)
        if key not in by_shape:
            by_shape[key] = _tuned_steps(module, tuner)
        steps[module] = by_shape[key]
    tuner.save()
    return steps
