"""`SparseLinear`, which reads the columns of some inputs; `ThresholdedActivation` (CATS); `DensePrefill`.

Dimension letters: B any leading dimensions, L sequence, N rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.kernels import gather
from intaglio.modeling.anatomy import CACHE
from intaglio.modeling.replacement import InputCounter, ReplacedLinear

Mode = Literal["all", "decode", "last_fraction"]
ALL, NONE = -1.0, math.inf
"""Thresholds that keep every input, or none."""


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


@dataclass
class _Prepared:
    """Values that follow from a weight, computed once."""

    key: tuple[int, int]  # identifies the weight
    scale_I: Tensor | None  # norms of columns, where scores are scaled
    weight_IO: Tensor | None = None  # the weight column by column
    tried: bool = False  # whether that copy was tried


class SparseLinear(ReplacedLinear):
    """A linear layer that multiplies with the columns of the inputs that matter, and gives the rest a low rank.

        m_i = not (|x_i| scale_i <= threshold),  scale_i = ||W[:, i]||_2
        y = W (m x) + U_r S_r V_r^T ((1 - m) x) + bias

    Few tokens are multiplied by the kernels of `intaglio.kernels.gather`, which read no other columns, from a copy of
    the weight that lies column by column; it is made in the first such pass, and only while it takes at most half of
    the free memory. All else is a dense product with zeros for the inputs that are not kept. Nothing here is trained.

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
        weight, prepared = self.weight, self._prepared
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
        few = x_BI.numel() <= gather.MOST_ROWS * self.in_features
        if few and not dense and self.tally is None and not (x_BI.requires_grad and torch.is_grad_enabled()):
            prepared = self._prepare()
            weight_IO = self._columns(prepared)
            if weight_IO is not None and x_BI.dtype == weight_IO.dtype:
                return self._gathered(x_BI, weight_IO, prepared.scale_I)
        return self._masked(x_BI, dense)

    def _gathered(self, x_BI: Tensor, weight_IO: Tensor, scale_I: Tensor | None) -> Tensor:
        """Return the product from the kept columns."""
        shape = x_BI.shape
        x_NI = x_BI if len(shape) == 2 else x_BI.reshape(-1, shape[-1])
        # Scores are needed only where channels are counted: the kernel compares with a threshold itself.
        limit = self.rule.limit(x_NI if self.rule.channels is None else self._score(x_NI, scale_I))
        limit = limit if isinstance(limit, float) else limit[:, 0]
        y_NO = gather.rows(x_NI, weight_IO, limit, scale_I, self.down, self.up, self.bias)
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

    def _product(self, x_BI: Tensor) -> Tensor:
        """Return W x + bias, by the very operation of the replaced module."""
        if not self.transposed:
            return F.linear(x_BI, self.weight, self.bias)
        x_NI = x_BI.reshape(-1, self.in_features)
        y_NO = x_NI @ self.weight if self.bias is None else torch.addmm(self.bias, x_NI, self.weight)
        return y_NO.view(*x_BI.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return sizes and rank."""
        return f"{super().extra_repr()}, rank={self.rank}"


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
