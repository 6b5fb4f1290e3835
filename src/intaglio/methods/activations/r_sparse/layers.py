"""`SparseLinear`, which reads the columns of some inputs; `ThresholdedActivation` (CATS); `DensePrefill`.

Dimension letters: B any leading dimensions, L sequence, N rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any, Literal

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.environment import tuning
from intaglio.kernels import gather
from intaglio.kernels._utils import copies
from intaglio.modeling.anatomy import CACHE
from intaglio.modeling.replacement import InputCounter, ReplacedLinear

Mode = Literal["all", "decode", "last_fraction"]
ALL, NONE = -1.0, math.inf
"""Thresholds that keep every input, or none."""
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Projections of one module that read the same tensor, in the order of the calls."""
_SETS = 8
"""Copies of all weights of a shared call that it is measured with, in turn."""


class DensePrefill:
    """Pre-hook on the base model that sets how many leading tokens of a pass are dense.

    A pass that begins with an empty cache, or without one, reads a prompt. Later passes are sparse, however many tokens
    they have, so that drafts are verified by the very model that decodes.

    Args:
        mode: `decode`: the whole prompt is dense; `last_fraction`: all of it but its end.
        fraction: of a prompt that is sparse, under `last_fraction`.

    Attributes:
        dense: leading tokens of each sequence in the current pass that are dense, padding counted.
    """

    def __init__(self, mode: Mode, fraction: float) -> None:
        self.mode, self.fraction = mode, fraction
        self.dense = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set `dense` for a call of the base model."""
        inputs = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        length = next(int(tensor.shape[1]) for tensor in inputs if isinstance(tensor, Tensor))
        cache = kwargs.get(CACHE)
        if cache is not None and int(cache.get_seq_length()):
            self.dense = 0
        else:
            self.dense = length if self.mode == "decode" else int(length * (1 - self.fraction))


@dataclass(frozen=True)
class InputRule:
    """Selection of the inputs of a projection; plain data of the record.

    Args:
        threshold: inputs with a larger score are kept.
        channels: instead of a threshold, how many inputs with the largest scores are kept for each token (ties at the
            edge go).
        scaled: whether the score is |x| times the norm of the input's column, or |x| alone.
    """

    threshold: float | None = None
    channels: int | None = None
    scaled: bool = True

    def limit(self, score_NI: Tensor) -> float | Tensor:
        """Return what a score must exceed: one number, or float32 [N, 1] where channels are counted."""
        if self.channels is None:
            return NONE if self.threshold is None else self.threshold
        width = score_NI.shape[-1]
        if self.channels >= width:
            return ALL
        return score_NI.kthvalue(width - self.channels, dim=-1, keepdim=True).values


Pair = tuple[Tensor, Tensor]
"""Low-rank factors `down` [R, I] and `up` [R, O]."""
LayerOption = tuple[InputRule, Pair | None]
"""Selection of a projection's inputs, and the factors for the others."""


@dataclass(eq=False)
class _Prepared:
    """Values that follow from a weight, computed once."""

    key: tuple[int, int]  # identifies the weight
    scale_I: Tensor | None  # norms of columns, where scores are scaled
    weight_IO: Tensor | None = None  # the weight column by column
    tried: bool = False  # whether that copy was tried
    threads: dict[int, int | None] = field(default_factory=dict)  # by rows; 0: dense, None: by size


class SparseLinear(ReplacedLinear):
    """A linear layer that multiplies with the columns of the inputs that matter, and gives the rest a low rank.

        m_i = not (|x_i| scale_i <= threshold),  scale_i = ||W[:, i]||_2
        y = W (m x) + U_r S_r V_r^T ((1 - m) x) + bias

    Few tokens are multiplied by the kernels of `intaglio.kernels.gather`, which read no other columns, from a copy of
    the weight that lies column by column, if the first such pass on the machine measures that to be faster
    (`environment.tuning`); the copy is made only while it takes at most half of the free memory. All else is a dense
    product with zeros for the inputs that are not kept. Nothing here is trained. Projections of one input share a call
    (`SharedInput`).

    Args:
        in_features: I.
        out_features: O.
        rank: R; 0: no low-rank path.
        bias: whether there is one.
        rule: which inputs are kept.
        transposed: whether the weight lies as that of a `Conv1D`, [I, O]. Default False.
        device: of the parameters.
        dtype: of the parameters.
    """

    slug = "r_sparse"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        rule: InputRule,
        transposed: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, transposed)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        shape = (in_features, out_features) if transposed else (out_features, in_features)
        self.weight = empty(*shape)
        self.bias = empty(out_features) if bias else None
        self.down = empty(rank, in_features) if rank else None
        self.up = empty(rank, out_features) if rank else None
        self.rule = rule
        self.prefill: DensePrefill | None = None
        self.tally: InputCounter | None = None
        self.shared = SharedInput([self])
        self._prepared: _Prepared | None = None

    @classmethod
    @torch.no_grad()
    def from_weight(
        cls,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        rule: InputRule,
        pair: Pair | None = None,
        transposed: bool = False,
    ) -> SparseLinear:
        """Return a layer with this weight: the very tensor where it lies as it should."""
        outputs, inputs = weight_OI.shape
        layer = cls(inputs, outputs, 0, False, rule, transposed, device="meta", dtype=weight_OI.dtype)
        stored = weight_OI.detach().T if transposed else weight_OI.detach()
        layer.weight = nn.Parameter(stored.contiguous(), requires_grad=False)
        if bias_O is not None:
            layer.bias, layer.has_bias = nn.Parameter(bias_O.detach(), requires_grad=False), True
        layer.set_option((rule, pair))
        return layer

    def set_option(self, option: LayerOption) -> None:
        """Set the rule and the low-rank factors."""
        self.rule, pair = option
        self.down = self.up = None
        if pair is not None and len(pair[0]):
            self.down, self.up = (nn.Parameter(part.to(self.weight).contiguous(), requires_grad=False) for part in pair)
        self._prepared = None

    @property
    def rank(self) -> int:
        """R."""
        return 0 if self.down is None else len(self.down)

    def norms(self) -> Tensor:
        """Return the norm of each column, float32 [I]."""
        return self.weight.float().norm(dim=1 if self.transposed else 0)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._prepared = None
        return super()._apply(fn, recurse)

    def _prepare(self) -> _Prepared:
        """Return what follows from the weight, computed anew where the weight has changed."""
        # As a module's attributes parameters are slow to find, which a product of one token notices.
        weight, prepared = self._parameters["weight"], self._prepared
        assert weight is not None
        key = (weight.data_ptr(), weight._version)
        if prepared is None or prepared.key != key:
            with torch.no_grad():
                prepared = self._prepared = _Prepared(key, self.norms() if self.rule.scaled else None)
        return prepared

    def _columns(self, prepared: _Prepared) -> Tensor | None:
        """Return the weight column by column [I, O], if there is a kernel for it, and memory."""
        if not prepared.tried:
            prepared.tried = True
            weight = self.weight.detach()
            if self.transposed:
                prepared.weight_IO = weight
            elif gather.kernel(weight[:1], weight.dtype) and weight.nbytes <= psutil.virtual_memory().available // 2:
                prepared.weight_IO = weight.T.contiguous()
        return prepared.weight_IO

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return y [B, O]; under a `DensePrefill`, the dimension before the last is the sequence."""
        dense = 0 if self.prefill is None else self.prefill.dense
        # Compilers must not trace into calls by address.
        few = x_BI.numel() <= gather.MOST_ROWS * self.in_features and not torch.compiler.is_compiling()
        if few and not dense and self.tally is None and not (x_BI.requires_grad and torch.is_grad_enabled()):
            prepared = self._prepare()
            weight_IO = self._columns(prepared)
            if weight_IO is not None and x_BI.dtype == weight_IO.dtype:
                if (y_BO := self.shared.take(self, prepared, x_BI)) is not None:
                    return y_BO
                threads = self._threads(prepared, x_BI, weight_IO)
                if threads != 0:
                    return self._gathered(x_BI, weight_IO, prepared.scale_I, threads)
        return self._masked(x_BI, dense)

    def _threads(self, prepared: _Prepared, x_BI: Tensor, weight_IO: Tensor) -> int | None:
        """Return the kernel's threads for so many rows, measured at the first use; 0: dense, None: by size."""
        rows = x_BI.numel() // self.in_features
        if rows not in prepared.threads:
            tuner = tuning.tuner()
            prepared.threads[rows] = None
            if tuner is not None and x_BI.device.type == "cpu":
                prepared.threads[rows] = self._tuned_threads(tuner, x_BI, weight_IO, prepared.scale_I)
        return prepared.threads[rows]

    def _tuned_threads(self, tuner: tuning.Tuner, x_BI: Tensor, weight_IO: Tensor, scale_I: Tensor | None) -> int:
        threads, columns, dense = torch.get_num_threads(), copies(weight_IO), copies(self.weight.detach())
        calls: dict[str, Callable[[], Tensor]] = {"dense": partial(self._masked_by, x_BI, dense)}
        for count in sorted({1, threads}):
            calls[f"gathered {count}"] = partial(self._gathered_by, x_BI, columns, scale_I, count)
        key = (
            f"columns {self.in_features}x{self.out_features} {str(weight_IO.dtype).removeprefix('torch.')} rank "
            f"{self.rank} kept {self._kept_quarters(x_BI)} rows {x_BI.numel() // self.in_features} threads {threads}"
        )
        chosen = tuner.choose(key, calls, compiles=True)
        tuner.save()
        return int(chosen.partition(" ")[2] or 0)

    def _kept_quarters(self, x_BI: Tensor) -> float:
        """Return the share of the inputs that are kept, rounded to a quarter."""
        return round(4 * float(self.kept(x_BI).float().mean())) / 4

    def _masked_by(self, x_BI: Tensor, weights: Iterator[Tensor]) -> Tensor:
        return self._product(torch.where(self.kept(x_BI), x_BI, 0), next(weights))

    def _gathered_by(
        self, x_BI: Tensor, weights: Iterator[Tensor], scale_I: Tensor | None, threads: int | None
    ) -> Tensor:
        return self._gathered(x_BI, next(weights), scale_I, threads)

    def _gathered(self, x_BI: Tensor, weight_IO: Tensor, scale_I: Tensor | None, threads: int | None = None) -> Tensor:
        """Return the product from the kept columns."""
        shape = x_BI.shape
        x_NI = x_BI if len(shape) == 2 else x_BI.reshape(-1, shape[-1])
        # Scores are needed only where channels are counted: the kernel compares with a threshold itself.
        limit = self.rule.limit(x_NI if self.rule.channels is None else self._score(x_NI, scale_I))
        limit = limit if isinstance(limit, float) else limit[:, 0]
        y_NO = gather.rows(x_NI, weight_IO, limit, scale_I, self.down, self.up, self.bias, threads)
        return y_NO if len(shape) == 2 else y_NO.view(*shape[:-1], self.out_features)

    def _score(self, x_BI: Tensor, scale_I: Tensor | None) -> Tensor:
        size_BI = x_BI.detach().abs().float()
        return size_BI if scale_I is None else size_BI * scale_I

    def kept(self, x_BI: Tensor) -> Tensor:
        """Return the mask m, bool [B, I], dense tokens aside. NaN is kept, so that it shows in the output."""
        score_BI = self._score(x_BI, self._prepare().scale_I)
        return ~(score_BI <= self.rule.limit(score_BI))

    def _masked(self, x_BI: Tensor, dense: int) -> Tensor:
        """Return the product with zeros; the first `dense` tokens of each sequence keep all their inputs."""
        length = x_BI.shape[-2] if x_BI.dim() > 1 else 1
        if dense >= length:
            if self.tally is not None:
                self.tally.add(x_BI.numel(), x_BI.numel())
            return self._product(x_BI)
        keep_BI = self.kept(x_BI)
        if dense:
            keep_BI[..., :dense, :] = True
        if self.tally is not None:
            self.tally.add(int(keep_BI.sum()), keep_BI.numel())
        y_BO = self._product(torch.where(keep_BI, x_BI, 0))
        if self.down is not None and self.up is not None:
            # Dense tokens have no remaining inputs, so zero is added to them.
            y_BO = y_BO + F.linear(torch.where(keep_BI, 0, x_BI), self.down) @ self.up
        return y_BO

    def _product(self, x_BI: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return W x + bias, by the very operation of the replaced module; `weight` replaces its own."""
        weight = self.weight if weight is None else weight
        if not self.transposed:
            return F.linear(x_BI, weight, self.bias)
        x_NI = x_BI.reshape(-1, self.in_features)
        y_NO = x_NI @ weight if self.bias is None else torch.addmm(self.bias, x_NI, weight)
        return y_NO.view(*x_BI.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return sizes and rank."""
        return f"{super().extra_repr()}, rank={self.rank}"


class SharedInput:
    """Sparse layers of a block that read the same input, such as q, k and v, computed in one kernel call; or one layer.

    The first layer that is called computes the outputs of all, and the others take theirs if they are called with the
    very same tensor. Used for layers without a low rank and with a threshold, several where it was measured to be
    faster than a call for each (`environment.tuning`); its arguments are prepared once.

    Args:
        layers: in the order of the calls.
    """

    def __init__(self, layers: Sequence[SparseLinear]) -> None:
        self._layers = tuple(layers)
        self._prepared: list[_Prepared] = []
        self._rules: list[InputRule] = []
        self._weights: list[Tensor] = []
        self._built: gather.SharedInput | None = None
        self._threads: dict[int, int] = {}
        self._waiting: tuple[Tensor, dict[SparseLinear, tuple[Any, Any, Any]]] | None = None

    def __getstate__(self) -> tuple[SparseLinear, ...]:
        """Return the layers alone: a copy has weights at other addresses."""
        return self._layers

    def __setstate__(self, layers: tuple[SparseLinear, ...]) -> None:
        """Start anew with copied layers."""
        self.__init__(layers)  # type: ignore[misc]

    def take(self, layer: SparseLinear, prepared: _Prepared, x_BI: Tensor) -> Tensor | None:
        """Return the output of a layer, or None where the layers are better computed one by one."""
        waiting = self._waiting
        if waiting is not None and waiting[0] is x_BI:
            own, rule, y_BO = waiting[1].pop(layer, (None, None, None))
            if not waiting[1]:
                self._waiting = None
            return y_BO if own is prepared and rule is layer.rule else None
        if layer is not self._layers[0] or (call := self._call()) is None:
            return None
        rows = x_BI.numel() // layer.in_features
        if rows not in self._threads:
            self._threads[rows] = self._chosen_threads(call, x_BI, rows)
        if not self._threads[rows]:
            return None
        first, *others = self._outputs(call, x_BI, self._threads[rows])
        if not others:
            return first
        keys = [(own, one.rule) for own, one in zip(self._prepared[1:], self._layers[1:], strict=True)]
        self._waiting = x_BI, {one: (*key, y_BO) for one, key, y_BO in zip(self._layers[1:], keys, others, strict=True)}
        return first

    def _call(self) -> gather.SharedInput | None:
        """Return the call for weights and rules as they are; None where a layer does not fit."""
        prepared, rules = [layer._prepare() for layer in self._layers], [layer.rule for layer in self._layers]
        if self._prepared == prepared and self._rules == rules:
            return self._built
        weights = [layer._columns(own) for layer, own in zip(self._layers, prepared, strict=True)]
        self._weights = [weight_IO for weight_IO in weights if weight_IO is not None]
        fit = len(self._weights) == len(self._layers) and all(
            gather.kernel(weight_IO[:1], weight_IO.dtype) == "numba" and layer.rank == 0 and layer.rule.channels is None
            for layer, weight_IO in zip(self._layers, self._weights, strict=True)
        )
        self._built = self._build(self._weights, prepared) if fit else None
        self._prepared, self._rules = prepared, rules
        return self._built

    def _build(self, weights: Sequence[Tensor], prepared: Sequence[_Prepared]) -> gather.SharedInput:
        return gather.shared_input(
            [
                (weight_IO, NONE if (limit := layer.rule.threshold) is None else limit, own.scale_I, layer.bias)
                for layer, weight_IO, own in zip(self._layers, weights, prepared, strict=True)
            ]
        )

    def _outputs(self, call: gather.SharedInput, x_BI: Tensor, threads: int) -> list[Tensor]:
        if x_BI.dtype == torch.float32:
            return call(x_BI.contiguous(), threads)
        return [y_BO.to(x_BI.dtype) for y_BO in call(x_BI.float().contiguous(), threads)]

    def _chosen_threads(self, call: gather.SharedInput, x_BI: Tensor, rows: int) -> int:
        """Return the threads of the shared call for so many rows, measured at the first use; 0: a call for each."""
        tuner, threads = tuning.tuner(), torch.get_num_threads()
        if tuner is None:
            return min(threads, call.worth(rows))
        if len(self._layers) == 1:
            return self._layers[0]._threads(self._prepared[0], x_BI, self._weights[0]) or 0
        prepared, columns = self._prepared, [copies(weight_IO) for weight_IO in self._weights]
        each: list[Callable[[], Tensor]] = []
        for layer, own, weight_IO, turn in zip(self._layers, prepared, self._weights, columns, strict=True):
            own_threads = layer._threads(own, x_BI, weight_IO)
            if own_threads == 0:
                each.append(partial(layer._masked_by, x_BI, copies(layer.weight.detach())))
            else:
                each.append(partial(layer._gathered_by, x_BI, turn, own.scale_I, own_threads))

        def separate() -> list[Tensor]:
            return [one() for one in each]

        def built() -> Iterator[gather.SharedInput]:
            yield from cycle([self._build([next(turn) for turn in columns], prepared) for _ in range(_SETS)])

        sets, calls = built(), {"separate": separate}
        for number in sorted({1, threads}):
            calls[f"shared {number}"] = partial(lambda number: self._outputs(next(sets), x_BI, number), number)
        dtype = str(self._weights[0].dtype).removeprefix("torch.")
        kept = self._layers[0]._kept_quarters(x_BI)
        key = (
            f"columns {call.inputs}x{'+'.join(map(str, call.widths))} {dtype} kept {kept} rows {rows} threads {threads}"
        )
        chosen = tuner.choose(key, calls, compiles=True)
        tuner.save()
        return int(chosen.partition(" ")[2] or 0)


def share_inputs(model: nn.Module) -> None:
    """Let the sparse layers of a model that read the same input share kernel calls: q, k, v, and gate, up."""
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in _SAME_INPUT:
            layers = [children.get(name) for name in names]
            sparse = [layer for layer in layers if isinstance(layer, SparseLinear)]
            if len(sparse) > 1:
                shared = SharedInput(sparse)
                for layer in sparse:
                    layer.shared = shared


class ThresholdedActivation(nn.Module):
    """An activation function whose small values are zero: T(a) = a where |a| > threshold (CATS).

    Args:
        activation: the function, such as SiLU.
        threshold: below 0 keeps everything.
    """

    def __init__(self, activation: nn.Module, threshold: float) -> None:
        super().__init__()
        self.activation = activation
        self.threshold = threshold
        self.prefill: DensePrefill | None = None
        self.tally: InputCounter | None = None

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return T(activation(x)) [B, I]."""
        a_BI: Tensor = self.activation(x_BI)
        keep_BI = ~(a_BI.abs() <= self.threshold)
        if self.prefill is not None and self.prefill.dense:
            keep_BI[..., : self.prefill.dense, :] = True
        if self.tally is not None:
            self.tally.add(int(keep_BI.sum()), keep_BI.numel())
        return torch.where(keep_BI, a_BI, 0)
