"""Replacements for a projection: a low-rank pair with columns of the input, or a pair with single weights.

Dimension letters: B any leading dimensions, I inputs, O outputs, R rank, C columns, K = R + C, E single weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.errors import IntaglioError
from intaglio.modeling.replacement import ReplacedLinear

Activation = Literal["silu", "identity"]


@dataclass(frozen=True)
class LostLinearConfig:
    """Combination of the parts of a projection: the same for all projections of a model, but for an adapter's scale.

    Args:
        low: scale of the low-rank part, γ.
        sparse: scale of the sparse part, 1 - γ.
        activation: between the two factors.
        adapter: scale of both parts when they are added to a frozen weight, α / R; None: they replace it.
    """

    low: float
    sparse: float
    activation: Activation = "identity"
    adapter: float | None = None

    @property
    def scales(self) -> tuple[float, float]:
        """The scales of the low-rank and of the sparse part, an adapter's included."""
        adapter = 1.0 if self.adapter is None else self.adapter
        return self.low * adapter, self.sparse * adapter


class LowRankLinear(ReplacedLinear):
    """Base of both kinds: a pair of factors `down` and `up`, and a sparse part beside it.

    Args:
        inputs: I.
        outputs: O.
        rank: R.
        config: how the parts are combined.
        bias: whether there is one.
        transposed: whether it replaces a `Conv1D`.
        extra: inputs of `up` beyond R.
    """

    slug = "lost"

    def __init__(
        self, inputs: int, outputs: int, rank: int, config: LostLinearConfig, bias: bool, transposed: bool, extra: int
    ) -> None:
        super().__init__(inputs, outputs, bias, transposed)
        self.rank, self.config = rank, config
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank + extra, outputs, bias=bias)

    @property
    def A(self) -> Tensor:
        """The factor that is applied first [R, I]."""
        return self.down.weight

    @property
    def B(self) -> Tensor:
        """The factor that is applied last [O, R]."""
        return self.up.weight[:, : self.rank]

    def _product(self) -> Tensor:
        """Return BA [O, I] with its scale, in float32."""
        if self.config.activation != "identity":
            raise IntaglioError(
                f"a pair of factors with the activation {self.config.activation} between them is no matrix, so it"
                " cannot be merged; train with activation: identity"
            )
        return self.config.scales[0] * self.B.float() @ self.A.float()

    def extra_repr(self) -> str:
        """Return sizes and scales."""
        return f"{super().extra_repr()}, rank={self.rank}, config={self.config}"


class LostLinear(LowRankLinear):
    """y = γ act(x Aᵀ) Bᵀ + (1 - γ) x[I] Wsᵀ + bias: a low-rank pair and a few columns of the input.

    B and Ws lie beside one another in one matrix, so that a pass takes two products: [γ act(x Aᵀ), (1 - γ) x[I]] is
    multiplied with [B, Ws]. As an adapter it is y = W x + bias + (α / R) (the two parts), with W frozen.

    Args:
        inputs: I.
        outputs: O.
        rank: R.
        columns: C; 0: the pair alone.
        config: how the parts are combined.
        bias: whether there is one. Default False.
        transposed: whether it replaces a `Conv1D`. Default False.
    """

    columns: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        columns: int,
        config: LostLinearConfig,
        *,
        bias: bool = False,
        transposed: bool = False,
    ) -> None:
        super().__init__(inputs, outputs, rank, config, bias, transposed, columns)
        self.register_buffer("columns", torch.zeros(columns, dtype=torch.int64) if columns else None)
        frozen = config.adapter is not None
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False) if frozen else None

    @property
    def Ws(self) -> Tensor:
        """The weights of the columns [O, C]."""
        return self.up.weight[:, self.rank :]

    @property
    def trained_parameters(self) -> int:
        """R (I + O) + C O."""
        return self.down.weight.numel() + self.up.weight.numel()

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return y [B, O]."""
        low, sparse = self.config.scales
        z_BK = self.down(x_BI)
        if self.config.activation == "silu":
            z_BK = F.silu(z_BK)
        z_BK = z_BK * low
        if self.columns is not None:
            x_BC = x_BI.index_select(-1, self.columns).to(z_BK.dtype)
            z_BK = torch.cat([z_BK, x_BC * sparse], dim=-1)
        y_BO: Tensor = self.up(z_BK)
        return y_BO if self.weight is None else y_BO + F.linear(x_BI, self.weight)

    def dense(self) -> Tensor:
        """Return γ BA + (1 - γ) Ws at its columns [O, I] (and W), in float32; see the base."""
        weight_OI = self._product()
        if self.columns is not None:
            weight_OI.index_add_(1, self.columns, self.config.scales[1] * self.Ws.float())
        return weight_OI if self.weight is None else weight_OI + self.weight.float()


class ElementsLinear(LowRankLinear):
    """y = x (γ BA + (1 - γ) S)ᵀ + bias: a low-rank pair and single weights at fixed positions, SLTrain's layer.

    The matrix is made in every pass, and again for the gradient instead of being kept, as there.

    Args:
        inputs: I.
        outputs: O.
        rank: R.
        elements: E, the entries of S that are not zero.
        config: how the parts are combined, without activation or adapter.
        bias: whether there is one. Default False.
        transposed: whether it replaces a `Conv1D`. Default False.
    """

    places: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        elements: int,
        config: LostLinearConfig,
        *,
        bias: bool = False,
        transposed: bool = False,
    ) -> None:
        super().__init__(inputs, outputs, rank, config, bias, transposed, 0)
        self.values = nn.Parameter(torch.empty(elements))
        self.register_buffer("places", torch.zeros(elements, dtype=torch.int64))

    @property
    def trained_parameters(self) -> int:
        """R (I + O) + E."""
        return self.down.weight.numel() + self.up.weight.numel() + self.values.numel()

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return y [B, O]."""
        y_BO: Tensor = _MaterializedLinear.apply(x_BI, self.B, self.A, self.values, self.places, self.config.scales)
        return y_BO if self.up.bias is None else y_BO + self.up.bias

    def dense(self) -> Tensor:
        """Return γ BA + (1 - γ) S [O, I], in float32; see the base."""
        return _materialize(self.B.float(), self.A.float(), self.values.float(), self.places, self.config.scales)


def _materialize(B_OR: Tensor, A_RI: Tensor, values_E: Tensor, places_E: Tensor, scales: tuple[float, float]) -> Tensor:
    """Return the matrix [O, I] of a pair and of single weights at positions counted row by row."""
    weight_OI = (scales[0] * B_OR) @ A_RI
    weight_OI.view(-1).index_add_(0, places_E, (scales[1] * values_E).to(weight_OI.dtype))
    return weight_OI


class _MaterializedLinear(torch.autograd.Function):
    """Product with a matrix that is not kept for the gradient."""

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
        return F.linear(x_BI, _materialize(B_OR, A_RI, values_E, places_E, scales))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, B_OR, A_RI, values_E, places_E = ctx.saved_tensors
        low, sparse = ctx.scales
        # Under autocast the incoming gradient is coarser than the weights.
        grad_BO = grads[0].to(B_OR.dtype)
        grad_x = (grad_BO @ _materialize(B_OR, A_RI, values_E, places_E, ctx.scales)).to(x_BI.dtype)
        grad_OI = grad_BO.flatten(0, -2).T @ x_BI.to(B_OR.dtype).flatten(0, -2)
        grad_values = sparse * grad_OI.reshape(-1)[places_E]
        return grad_x, low * grad_OI @ A_RI.T, low * B_OR.T @ grad_OI, grad_values, None, None
