"""The modules: `SparseLinear`, which reads the columns of some inputs; `Cut`, an activation with a threshold (CATS);
and `Phase`, which knows which tokens of a pass are dense.

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


class Phase:
    """Which leading tokens of a pass are dense; a hook before each call of the base model.

    A pass that begins with an empty cache, or without one, reads a prompt. What comes behind it is sparse, however many
    tokens a pass has, so that drafts are verified by the very model that decodes.

    Args:
        mode: `decode`: the whole prompt is dense; `last_fraction`: all of it but its end.
        fraction: of a prompt that is sparse, under `last_fraction`.

    Attributes:
        dense: leading tokens of each sequence of the pass that goes on, padding counted.
    """

    def __init__(self, mode: Mode, fraction: float) -> None:
        self.mode, self.fraction = mode, fraction
        self.dense = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See the class.

        Args:
            module: the base model.
            args: of the call; ids may be the first.
            kwargs: of the call.
        """
        given = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        length = next(int(tensor.shape[1]) for tensor in given if isinstance(tensor, Tensor))
        cache = kwargs.get(CACHE)
        if cache is not None and int(cache.get_seq_length()):
            self.dense = 0
        else:
            self.dense = length if self.mode == "decode" else int(length * (1 - self.fraction))


@dataclass(frozen=True)
class Rule:
    """Which inputs of a projection are kept; plain data of the record.

    Args:
        threshold: inputs that score more are kept.
        channels: in the place of a threshold, so many with the largest scores of each token (ties at the edge go).
        scaled: whether the score is |x| times the norm of the input's column, or |x| alone.
    """

    threshold: float | None = None
    channels: int | None = None
    scaled: bool = True

    def limit(self, score_NI: Tensor) -> float | Tensor:
        """What a score must be above: one number, or float32 [N, 1].

        Args:
            score_NI: of each input; looked at where the channels are counted.
        """
        if self.channels is None:
            return NONE if self.threshold is None else self.threshold
        width = score_NI.shape[-1]
        if self.channels >= width:
            return ALL
        return score_NI.kthvalue(width - self.channels, dim=-1, keepdim=True).values


@dataclass
class _Ready:
    """What a product needs that follows from the weight, made once.

    Args:
        key: which weight it is of.
        scale_I: norms of columns, or None where scores are not scaled.
        weight_IO: the weight column by column, or None.
        asked: whether that was tried.
    """

    key: tuple[int, int]
    scale_I: Tensor | None
    weight_IO: Tensor | None = None
    asked: bool = False


class SparseLinear(ReplacedLinear):
    """A linear layer that multiplies with the columns of the inputs that matter, and gives the rest a low rank.

        m_i = not (|x_i| scale_i <= threshold),  scale_i = ||W[:, i]||_2
        y = W (m x) + U_r S_r V_r^T ((1 - m) x) + bias

    Few tokens are multiplied by the kernels of `intaglio.kernels.gather`, which read no other columns, from a copy of
    the weight that lies column by column; it is made in the first such pass, and only while it takes at most half of
    the memory that is free. All else is a dense product in which what is not kept is zero. Nothing here is trained.

    Args:
        in_features: I.
        out_features: O.
        rank: R; 0: no low-rank path.
        bias: whether there is one.
        rule: what is kept.
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
        rule: Rule,
        transposed: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        shape = (in_features, out_features) if transposed else (out_features, in_features)
        self.weight = empty(*shape)
        self.bias = empty(out_features) if bias else None
        self.down = empty(rank, in_features) if rank else None
        self.up = empty(rank, out_features) if rank else None
        self.rule, self.transposed = rule, transposed
        self.phase: Phase | None = None
        self.tally: InputCounter | None = None
        self._ready: _Ready | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        rule: Rule,
        pair: tuple[Tensor, Tensor] | None = None,
        transposed: bool = False,
    ) -> SparseLinear:
        """A layer with this weight; the very tensor where it lies as it should.

        Args:
            weight_OI: W.
            bias_O: or None.
            rule: what is kept.
            pair: `down` [R, I] and `up` [R, O], or None.
            transposed: whether it stands for a `Conv1D`.
        """
        outputs, inputs = weight_OI.shape
        made = cls(inputs, outputs, 0, False, rule, transposed, device="meta", dtype=weight_OI.dtype)
        stored = weight_OI.detach().T if transposed else weight_OI.detach()
        made.weight = nn.Parameter(stored.contiguous(), requires_grad=False)
        if bias_O is not None:
            made.bias = nn.Parameter(bias_O.detach(), requires_grad=False)
        if pair is not None and len(pair[0]):
            made.down, made.up = (nn.Parameter(part.to(weight_OI).contiguous(), requires_grad=False) for part in pair)
        return made

    @property
    def rank(self) -> int:
        """R."""
        return 0 if self.down is None else len(self.down)

    @property
    def weight_OI(self) -> Tensor:
        """W."""
        return self.weight.T if self.transposed else self.weight

    def norms(self) -> Tensor:
        """The norm of each column, float32 [I]."""
        return self.weight.float().norm(dim=1 if self.transposed else 0)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._ready = None
        return super()._apply(fn, recurse)

    def forget(self) -> None:
        """The rule has changed: what follows from it is made anew."""
        self._ready = None

    def _made_ready(self) -> _Ready:
        """What follows from the weight; made anew where that is another than before."""
        weight, ready = self.weight, self._ready
        key = (weight.data_ptr(), weight._version)
        if ready is None or ready.key != key:
            with torch.no_grad():
                ready = self._ready = _Ready(key, self.norms() if self.rule.scaled else None)
        return ready

    def _columns(self, ready: _Ready) -> Tensor | None:
        """The weight column by column [I, O], if there is a kernel for it, and memory."""
        if not ready.asked:
            ready.asked = True
            weight = self.weight.detach()
            if self.transposed:
                ready.weight_IO = weight
            elif gather.kernel(weight[:1], weight.dtype) and weight.nbytes <= psutil.virtual_memory().available // 2:
                ready.weight_IO = weight.T.contiguous()
        return ready.weight_IO

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return y [B, O].

        Args:
            x_BI: the input; under a `Phase`, the dimension before the last is the sequence.
        """
        dense = 0 if self.phase is None else self.phase.dense
        few = x_BI.numel() <= gather.MOST_ROWS * self.in_features
        if few and not dense and self.tally is None and not (x_BI.requires_grad and torch.is_grad_enabled()):
            ready = self._made_ready()
            weight_IO = self._columns(ready)
            if weight_IO is not None and x_BI.dtype == weight_IO.dtype:
                return self._gathered(x_BI, weight_IO, ready.scale_I)
        return self._masked(x_BI, dense)

    def _gathered(self, x_BI: Tensor, weight_IO: Tensor, scale_I: Tensor | None) -> Tensor:
        """The product from columns."""
        shape = x_BI.shape
        x_NI = x_BI if len(shape) == 2 else x_BI.reshape(-1, shape[-1])
        limit: float | Tensor
        if self.rule.channels is None:
            limit = NONE if self.rule.threshold is None else self.rule.threshold
        else:
            limit = self.rule.limit(self._score(x_NI, scale_I))
            limit = limit if isinstance(limit, float) else limit[:, 0]
        y_NO = gather.rows(x_NI, weight_IO, limit, scale_I, self.down, self.up, self.bias)
        return y_NO if len(shape) == 2 else y_NO.view(*shape[:-1], self.out_features)

    def _score(self, x_BI: Tensor, scale_I: Tensor | None) -> Tensor:
        size_BI = x_BI.detach().abs().float()
        return size_BI if scale_I is None else size_BI * scale_I

    def kept(self, x_BI: Tensor) -> Tensor:
        """The mask m, bool [B, I], whatever the phase. What is not a number is kept, so that it shows.

        Args:
            x_BI: the input.
        """
        scale_I = self._made_ready().scale_I
        return ~((score := self._score(x_BI, scale_I)) <= self.rule.limit(score))

    def _masked(self, x_BI: Tensor, dense: int) -> Tensor:
        """The product with zeros; the first `dense` tokens of each sequence keep all their inputs."""
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
            # Of dense tokens nothing is left over: what is added to them is zero.
            y_BO = y_BO + F.linear(torch.where(keep_BI, 0, x_BI), self.down) @ self.up
        return y_BO

    def _product(self, x_BI: Tensor) -> Tensor:
        """W x + bias, by the very operation of the module that this one stands for."""
        if not self.transposed:
            return F.linear(x_BI, self.weight, self.bias)
        x_NI = x_BI.reshape(-1, self.in_features)
        y_NO = x_NI @ self.weight if self.bias is None else torch.addmm(self.bias, x_NI, self.weight)
        return y_NO.view(*x_BI.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As `nn.Linear` says it, and the rank."""
        return f"{super().extra_repr()}, rank={self.rank}"


class Cut(nn.Module):
    """An activation function whose small values are zero: T(a) = a where |a| > threshold (CATS).

    Args:
        activation: the function, such as SiLU.
        threshold: below 0 keeps everything.
    """

    def __init__(self, activation: nn.Module, threshold: float) -> None:
        super().__init__()
        self.activation = activation
        self.threshold = threshold
        self.phase: Phase | None = None
        self.tally: InputCounter | None = None

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return T(activation(x)) [B, I].

        Args:
            x_BI: what the gate gave.
        """
        a_BI: Tensor = self.activation(x_BI)
        keep_BI = ~(a_BI.abs() <= self.threshold)
        if self.phase is not None and self.phase.dense:
            keep_BI[..., : self.phase.dense, :] = True
        if self.tally is not None:
            self.tally.add(int(keep_BI.sum()), keep_BI.numel())
        return torch.where(keep_BI, a_BI, 0)


__all__ = ["ALL", "NONE", "Cut", "Mode", "Phase", "Rule", "SparseLinear"]
