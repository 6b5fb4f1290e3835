"""Linear layers by the fastest product for a few tokens, so that a pass over them costs little more than over one.

On a CPU the usual matrix product is made for many rows. Two others are measured against it for each shape
(`environment.tuning`), and serve the numbers of rows for which they are faster:

- *prepacked*: the usual product repacks the weight in each call, which a single row does not need and many rows pay
  back; from two to some hundred rows, those of a drafted tree, it is most of the time. oneDNN accepts weights in a
  layout of its own. A linear layer gets such a copy at its first call in a run. The two operators are those that
  torch's inductor calls for frozen weights. Copies are kept for the next run, as long as the module lives.
- *direct*: our own product from the weight as it lies (`kernels.dense_llvmlite`), with one thread or all.

They are used only during the passes of the loop, and in all passes over few tokens of a model with
`use_in_passes`; the weights themselves are unchanged. Without the operators, or without llvmlite, that candidate is
left out. Sums run in another order, so the last bits differ, as they do between a
pass over one token and over several.
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
from intaglio.kernels._utils import works

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
_INPUTS = ("input_ids", "inputs_embeds")
_RESERVE = 0.8
"""Seconds of measuring that are left for whole passes."""

STOCK, PREPACKED, DIRECT = "stock", "prepacked", "direct"
"""Products; the name of the last is followed by its number of threads."""
Steps = tuple[str, ...]
"""The product for each of `_ROW_STEPS`."""
_ALWAYS: Steps = (PREPACKED,) * len(_ROW_STEPS)


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
    """Context in which the linear layers of a model use the products chosen for them, without gradients.

    Only layers on a CPU in float32 or bfloat16 do. A thread that leaves the context while another is in it ends it for
    both: the other's pass then continues with the weights themselves.

    Args:
        model: the model.
        steps: choices for each usable layer; layers without any stay stock. Default: the prepacked product always.
    """

    def __init__(self, model: nn.Module, steps: dict[nn.Module, Steps] | None = None) -> None:
        if steps is None:
            steps = dict.fromkeys((module for module in model.modules() if PREPACKED in _products(module)), _ALWAYS)
        self._forwards = [(m, partial(_forward, m, own)) for m, own in steps.items() if set(own) != {STOCK}]
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


def _products(module: Any) -> tuple[str, ...]:
    """Return the products that can serve a layer, the stock one aside."""
    if type(module) not in (nn.Linear, Conv1D):
        return ()
    # A module with a forward of its own was changed by other code, which wins.
    own, weight = module.__dict__.get("forward"), module.weight
    if own is not None and not (isinstance(own, partial) and own.func is _forward):
        return ()
    if (weight.device.type, weight.layout) != ("cpu", torch.strided) or weight.dtype not in _DTYPES:
        return ()
    return (
        *((PREPACKED,) if _onednn() and _works(weight.dtype) else ()),
        *(_direct_products() if type(module) is nn.Linear and weight.is_contiguous() else ()),
    )


def _onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _direct_products() -> tuple[str, ...]:
    """Return the direct product with one thread and with all; nothing where it does not work."""
    return tuple(f"{DIRECT} {n}" for n in sorted({1, torch.get_num_threads()})) if _direct_works() else ()


@lru_cache(maxsize=1)
def _direct_works() -> bool:
    """Return whether the direct product can be compiled, and is right, on this processor."""
    if not works("llvmlite", "dense", "few tokens are multiplied by torch alone"):
        return False
    draws = torch.Generator().manual_seed(0)
    x_BI, weight_OI = (torch.rand(rows, 40, generator=draws) for rows in (3, 70))
    try:
        result_BO = _direct(x_BI, weight_OI, None, 3, f"{DIRECT} 1")
    except (OSError, RuntimeError):
        return False
    return torch.allclose(result_BO, x_BI @ weight_OI.T, atol=1e-4)


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
    """Compute the module's forward, by the product chosen for so many rows if that is exact."""
    rows = x.numel() // x.shape[-1]
    # As a module's attributes parameters are slow to find, which a product of one token notices.
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    product = _product_for(steps, rows)
    if product == STOCK or torch.is_grad_enabled() or x.dtype != weight.dtype:
        if type(module) is nn.Linear:
            return nn.functional.linear(x, weight, bias)
        stock: Tensor = type(module).forward(module, x)
        return stock
    if product != PREPACKED:
        return _direct(x, weight, bias, rows, product)
    copy = _COPIES.get(module)
    if copy is None:
        copy = _COPIES[module] = _Copy(_lay_out(_rows(module).contiguous()), _probe(module))
    return _product(x, copy.weight_IO, bias, rows)


@lru_cache(maxsize=4096)
def _product_for(steps: Steps, rows: int) -> str:
    product = steps[min(bisect_left(_ROW_STEPS, rows), len(_ROW_STEPS) - 1)]
    return product if rows <= (MAX_ROWS if product == PREPACKED else _ROW_STEPS[-1]) else STOCK


def _direct(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, rows: int, product: str) -> Tensor:
    """Multiply with a weight as it lies."""
    from intaglio.kernels import dense_llvmlite  # llvmlite is optional

    y_NO = dense_llvmlite.linear(x.reshape(rows, -1), weight_OI, bias_O, int(product.rpartition(" ")[2]))
    return y_NO.view(*x.shape[:-1], -1)


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
    weights, products, steps = _Weights(module), _products(module), []
    for rows in _ROW_STEPS:
        x_BI = torch.full((rows, weights.inputs), 0.5, dtype=weights.dtype)
        calls = {STOCK: partial(lambda x: nn.functional.linear(x, next(weights.stock)), x_BI)}
        for name in products:
            if name == PREPACKED:
                calls[name] = partial(lambda x, rows: _product(x, next(weights.laid_out), None, rows), x_BI, rows)
            else:
                calls[name] = partial(
                    lambda *own: _direct(own[0], next(weights.stock), None, *own[1:]), x_BI, rows, name
                )
        key = f"{weights.key} rows {rows} threads {torch.get_num_threads()}"
        steps.append(tuner.choose(key, calls, reserve=_RESERVE))
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
        wanted: True: prepacked products wherever possible. False: stock ones. None: those measured to be fastest, if
            the run may emit at least 32 tokens and the copies take at most half of the free memory.
        tokens: most new tokens of the run.
    """
    if wanted is False:
        return None
    usable = {module: products for module in model.modules() if (products := _products(module))}
    if wanted:
        return Prepacked(model) if any(PREPACKED in products for products in usable.values()) else None
    if not usable or tokens < MIN_NEW_TOKENS:
        return None
    steps = choices(usable)
    missing = sum(_rows(m).nbytes for m, own in steps.items() if PREPACKED in own and m not in _COPIES)
    if all(set(own) == {STOCK} for own in steps.values()) or missing > psutil.virtual_memory().available // 2:
        return None
    return Prepacked(model, steps)


class _FewTokens:
    """Hooks of a model, whose passes over few tokens without gradients are in a `Prepacked` context, if that wins."""

    def __init__(self) -> None:
        self._context: Prepacked | None = None
        self._head: Any = None
        self._inside = False

    def before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Enter the context, whose products are chosen in the first such pass."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or tuning.tuner() is None:
            return
        inputs = next((x for x in (*args[:1], *map(kwargs.get, _INPUTS)) if isinstance(x, Tensor)), None)
        if inputs is None or inputs.shape[:2].numel() > _ROW_STEPS[-1]:
            return
        head = model.get_output_embeddings()
        if self._head is not head:
            self._head, self._context = head, prepacked(model, None, MIN_NEW_TOKENS)
        if self._context is not None:
            self._context.__enter__()
            self._inside = True

    def after(self, *_: Any) -> None:
        """Leave the context."""
        if self._inside:
            self._inside = False
            self._context.__exit__()  # type: ignore[union-attr]


def use_in_passes(model: nn.Module) -> None:
    """Let a model's linear layers use the products measured to be fastest in all of its passes over few tokens."""
    if not any(isinstance(getattr(hook, "__self__", None), _FewTokens) for hook in model._forward_pre_hooks.values()):
        hooks = _FewTokens()
        model.register_forward_pre_hook(hooks.before, with_kwargs=True)
        model.register_forward_hook(hooks.after, always_call=True)


def choices(modules: Iterable[nn.Module]) -> dict[nn.Module, Steps]:
    """Return the products of each layer that has a choice; without a tuner the prepacked one wherever it works."""
    tuner = tuning.tuner()
    usable = {module: products for module in modules if (products := _products(module))}
    if tuner is None:
        return {module: _ALWAYS for module, products in usable.items() if PREPACKED in products}
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
