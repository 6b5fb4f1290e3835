"""What stands in the place of a projection: a low-rank pair and columns of the input, or a pair and single weights.

Dimension letters: B any leading dimensions, I inputs, O outputs, R rank, C columns, K = R + C, E single weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from intaglio.errors import IntaglioError
from intaglio.modeling.replacement import ReplacedLinear

Activation = Literal["silu", "identity"]


@dataclass(frozen=True)
class Form:
    """How the parts of a projection are put together: the same for all projections of a carving, but for the rank.

    Args:
        low: what the low-rank part is multiplied with, γ.
        sparse: what the sparse part is multiplied with, 1 - γ.
        activation: between the two factors.
        adapter: what both are multiplied with beside the frozen weight that they are added to; None: there is none.
    """

    low: float
    sparse: float
    activation: Activation = "identity"
    adapter: float | None = None

    @property
    def scales(self) -> tuple[float, float]:
        """Of the low-rank and of the sparse part, all told."""
        whole = 1.0 if self.adapter is None else self.adapter
        return self.low * whole, self.sparse * whole


class _LowRank(ReplacedLinear):
    """What the two kinds of projections share: a pair of factors, beside it something sparse, and a bias.

    Args:
        inputs: I.
        outputs: O.
        rank: R.
        form: how the parts are put together.
        bias: whether there is one.
        transposed: whether it stands for a `Conv1D`, which stores its weight the other way round.
    """

    slug: ClassVar[str] = "lost"
    down: nn.Linear
    up: nn.Linear

    def __init__(self, inputs: int, outputs: int, rank: int, form: Form, bias: bool, transposed: bool) -> None:
        super().__init__(inputs, outputs)
        self.rank, self.form, self.has_bias, self.transposed = rank, form, bias, transposed

    @property
    def A(self) -> Tensor:
        """The factor that is applied first [R, I]."""
        return self.down.weight

    @property
    def B(self) -> Tensor:
        """The factor that is applied last [O, R]."""
        return self.up.weight[:, : self.rank]

    @property
    def trained_parameters(self) -> int:
        """Numbers that are trained, without the bias."""
        raise NotImplementedError

    def _product(self) -> Tensor:
        """BA [O, I] with its scale, in float32."""
        if self.form.activation != "identity":
            raise IntaglioError(
                f"a pair of factors with the activation {self.form.activation} between them is no matrix, so it cannot"
                " be merged; train with activation: identity"
            )
        return self.form.scales[0] * self.B.float() @ self.A.float()

    @torch.no_grad()
    def merged(self) -> nn.Linear | Conv1D:
        """The stock module with the matrix that this one multiplies with, in the same dtype.

        Raises:
            IntaglioError: there is an activation between the factors.
        """
        bias_O = self.up.bias if self.has_bias else None
        return stock(self.dense(), bias_O, self.transposed, self.A)

    def extra_repr(self) -> str:
        """Sizes and scales."""
        return f"{super().extra_repr()}, rank={self.rank}, form={self.form}"


class LostLinear(_LowRank):
    """y = γ act(x Aᵀ) Bᵀ + (1 - γ) x[I] Wsᵀ + bias: a low-rank pair and a few columns of the input.

    B and Ws lie beside one another in one matrix, so that a pass takes two products: [γ act(x Aᵀ), (1 - γ) x[I]] is
    multiplied with [B, Ws]. As an adapter it is y = W x + bias + (α / R) (the two parts), with W frozen.

    Args:
        inputs: I.
        outputs: O.
        rank: R.
        columns: C; 0: the pair alone.
        form: how the parts are put together.
        bias: whether there is one. Default False.
        transposed: see `_LowRank`. Default False.
    """

    columns: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        columns: int,
        form: Form,
        *,
        bias: bool = False,
        transposed: bool = False,
    ) -> None:
        super().__init__(inputs, outputs, rank, form, bias, transposed)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank + columns, outputs, bias=bias)
        self.register_buffer("columns", torch.zeros(columns, dtype=torch.int64) if columns else None)
        self.weight = None if form.adapter is None else nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)

    @property
    def Ws(self) -> Tensor:
        """The weights of the columns [O, C]."""
        return self.up.weight[:, self.rank :]

    @property
    def trained_parameters(self) -> int:
        """R (I + O) + C O."""
        return self.down.weight.numel() + self.up.weight.numel()

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return y [B, O].

        Args:
            x_BI: the input.
        """
        low, sparse = self.form.scales
        z_BK = self.down(x_BI)
        if self.form.activation == "silu":
            z_BK = F.silu(z_BK)
        z_BK = z_BK * low
        if self.columns is not None:
            x_BC = x_BI.index_select(-1, self.columns).to(z_BK.dtype)
            z_BK = torch.cat([z_BK, x_BC * sparse], dim=-1)
        y_BO: Tensor = self.up(z_BK)
        return y_BO if self.weight is None else y_BO + F.linear(x_BI, self.weight)

    def dense(self) -> Tensor:
        """γ BA + (1 - γ) Ws at its columns [O, I] (and W), in float32; see the base."""
        found_OI = self._product()
        if self.columns is not None:
            found_OI.index_add_(1, self.columns, self.form.scales[1] * self.Ws.float())
        return found_OI if self.weight is None else found_OI + self.weight.float()


class ElementsLinear(_LowRank):
    """y = x (γ BA + (1 - γ) S)ᵀ + bias: a low-rank pair and single weights at fixed places, SLTrain's layer.

    The matrix is made in every pass, and made again for the gradient in the place of being kept, as there.

    Args:
        inputs: I.
        outputs: O.
        rank: R.
        elements: E, the entries of S that are not zero.
        form: how the parts are put together, without activation or adapter.
        bias: whether there is one. Default False.
        transposed: see `_LowRank`. Default False.
    """

    places: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        elements: int,
        form: Form,
        *,
        bias: bool = False,
        transposed: bool = False,
    ) -> None:
        super().__init__(inputs, outputs, rank, form, bias, transposed)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=bias)
        self.values = nn.Parameter(torch.empty(elements))
        self.register_buffer("places", torch.zeros(elements, dtype=torch.int64))

    @property
    def trained_parameters(self) -> int:
        """R (I + O) + E."""
        return self.down.weight.numel() + self.up.weight.numel() + self.values.numel()

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return y [B, O].

        Args:
            x_BI: the input.
        """
        y_BO: Tensor = _Materialised.apply(x_BI, self.B, self.A, self.values, self.places, self.form.scales)
        return y_BO if self.up.bias is None else y_BO + self.up.bias

    def dense(self) -> Tensor:
        """γ BA + (1 - γ) S [O, I], in float32; see the base."""
        return _materialise(self.B.float(), self.A.float(), self.values.float(), self.places, self.form.scales)


def _materialise(B_OR: Tensor, A_RI: Tensor, values_E: Tensor, places_E: Tensor, scales: tuple[float, float]) -> Tensor:
    """The matrix [O, I] of a pair and of single weights at places counted row by row."""
    weight_OI = (scales[0] * B_OR) @ A_RI
    weight_OI.view(-1).index_add_(0, places_E, (scales[1] * values_E).to(weight_OI.dtype))
    return weight_OI


class _Materialised(torch.autograd.Function):
    """A product with a matrix that is not kept for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BI: Tensor,
        B_OR: Tensor,
        A_RI: Tensor,
        values_E: Tensor,
        places_E: Tensor,
        scales: tuple[float, float],
    ) -> Tensor:
        ctx.save_for_backward(x_BI, B_OR, A_RI, values_E, places_E)
        ctx.scales = scales
        return F.linear(x_BI, _materialise(B_OR, A_RI, values_E, places_E, scales))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, B_OR, A_RI, values_E, places_E = ctx.saved_tensors
        low, sparse = ctx.scales
        # Under autocast what comes in is coarser than the weights.
        grad_BO = grads[0].to(B_OR.dtype)
        grad_x = (grad_BO @ _materialise(B_OR, A_RI, values_E, places_E, ctx.scales)).to(x_BI.dtype)
        grad_OI = grad_BO.flatten(0, -2).T @ x_BI.to(B_OR.dtype).flatten(0, -2)
        grad_values = sparse * grad_OI.reshape(-1)[places_E]
        return grad_x, low * grad_OI @ A_RI.T, low * B_OR.T @ grad_OI, grad_values, None, None


@torch.no_grad()
def stock(weight_OI: Tensor, bias_O: Tensor | None, transposed: bool, like: Tensor) -> nn.Linear | Conv1D:
    """A stock module.

    Args:
        weight_OI: its matrix.
        bias_O: its bias; None: it has none, which a `Conv1D` writes as zeros.
        transposed: a `Conv1D` in the place of an `nn.Linear`.
        like: gives dtype and device.
    """
    outputs, inputs = weight_OI.shape
    with torch.device("meta"):  # nothing is drawn
        made = Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs, bias=bias_O is not None)
    made.to(like.dtype).to_empty(device=like.device)
    weight = weight_OI.T if transposed else weight_OI
    made.weight.copy_(weight)
    if made.bias is not None:
        made.bias.copy_(torch.zeros_like(made.bias) if bias_O is None else bias_O)
    return made


__all__ = ["Activation", "ElementsLinear", "Form", "LostLinear", "stock"]
