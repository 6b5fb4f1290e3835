"""Experts and their router, the replacement for an MLP.

Dimension letters: B any leading dimensions, T tokens, E experts, K chosen experts of a token, R = T K rows of them, F
units of an expert, D width, N = E F all units.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from intaglio.kernels.grouped_mm import grouped_linear
from intaglio.methods.activations.moe_x.routing import (
    Gates,
    choose,
    entropy,
    firing_probability,
    loads,
    moments,
    sparsity_scores,
)
from intaglio.modeling.replacement import ReplacedMLP

Router = Literal["sparsity", "linear"]


@dataclass(frozen=True)
class MoELayerConfig:
    """Sizes and kinds of a layer: data that a record holds and a layer is built from. See `MoEX` for other fields.

    Args:
        hidden: D.
        units: F.
        experts: E.
        active: K.
        activation: name of the activation in transformers.
        factor: whether activated units are multiplied with a second projection.
        biases: whether the encoder, that second projection and the decoder have biases.
        dropout: of the output, in training.
    """

    hidden: int
    units: int
    experts: int
    active: int
    activation: str = "relu"
    router: Router = "sparsity"
    gates: Gates = "chosen"
    temperature: float = 1.0
    factor: bool = False
    biases: tuple[bool, bool, bool] = (False, False, False)
    dropout: float = 0.0

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MoELayerConfig:
        """Return the config from the data of a record."""
        return cls(**{**data, "biases": tuple(data["biases"])})

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON-ready data."""
        return {**asdict(self), "biases": list(self.biases)}

    @property
    def expert_parameters(self) -> int:
        """Numbers of one expert."""
        encoder, factor, decoder = self.biases
        matrices = (2 + self.factor) * self.units * self.hidden
        return matrices + (encoder + (factor and self.factor)) * self.units + decoder * self.hidden


@dataclass(frozen=True, eq=False)
class RouterStats:
    """Routing of one pass of a layer, for the balance loss and for statistics.

    Args:
        scores_TE: over the temperature; the gradient reaches the router through them.
        chosen_TK: experts of each token.
        gates_TK: factors of their outputs.
        fired_TK: units of each of them that fired.
        fired_EF: for how many tokens each unit fired.
    """

    scores_TE: Tensor
    chosen_TK: Tensor
    gates_TK: Tensor
    fired_TK: Tensor
    fired_EF: Tensor

    def masked(self, real_T: Tensor | None) -> RouterStats:
        """Return the same without padding tokens, in all that is known by token.

        Without a mask, or with that of another pass, all tokens stay.
        """
        if real_T is None or len(real_T) != len(self.scores_TE):
            return self
        names = ("scores_TE", "chosen_TK", "gates_TK", "fired_TK")
        return replace(self, **{name: getattr(self, name)[real_T] for name in names})

    @torch.no_grad()
    def summary(self, config: MoELayerConfig) -> dict[str, float]:
        """Return the log values: `load entropy`, `L0`, `silent units`, and with a sparsity router `expected L0`."""
        values = {
            "load entropy": entropy(loads(self.chosen_TK, config.experts)),
            "L0": float(self.fired_TK.sum(1).double().mean()),
            "silent units": float((self.fired_EF == 0).double().mean()),
        }
        if config.router == "sparsity":
            probs_TE = firing_probability(self.scores_TE * config.temperature)
            values["expected L0"] = config.units * float(probs_TE.gather(1, self.chosen_TK).double().sum(1).mean())
        return values


class MoELayer(ReplacedMLP):
    """y = Σ_e g_e(x) (W_dec,e z_e + b_dec,e) over the K experts with the highest scores r_e(x), g their softmax.

        z_e = act(W_enc,e x + b_enc,e)                           plain
        z_e = act(W_enc,e x + b_enc,e) * (W_fac,e x + b_fac,e)   gated MLPs
        r_e = -erf(m_e / sqrt(2 v_e))                            router: sparsity, from the moments of W_enc,e's rows
        r_e = w_e · x                                            router: linear

    The moments follow the weights: they are taken anew in every pass with a gradient, which passes through them. A
    pass without one in evaluation keeps them for as long as the weights stay as they are.

    All tokens of an expert are multiplied at once, and all experts in one grouped product.

    Args:
        config: sizes and kinds.
        device: of the weights. Default: torch's.
        dtype: of the weights. Default: torch's.

    Attributes:
        watched: whether passes store `routed`. Default False.
        routed: routing of the last such pass.
    """

    slug = "moe_x"

    def __init__(self, config: MoELayerConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config.hidden)
        self.config = config
        E, units, width = config.experts, config.units, config.hidden
        with_encoder, with_factor, with_decoder = config.biases

        def weight(*sizes: int, wanted: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(sizes, device=device, dtype=dtype)) if wanted else None

        self.encoder = nn.Parameter(torch.zeros((E, units, width), device=device, dtype=dtype))
        # Biases of all experts in one row: two dimensions would make them a matrix, which decays in training.
        self.encoder_bias = weight(E * units, wanted=with_encoder)
        self.factor = weight(E, units, width, wanted=config.factor)
        self.factor_bias = weight(E * units, wanted=config.factor and with_factor)
        self.decoder = nn.Parameter(torch.zeros((E, width, units), device=device, dtype=dtype))
        self.decoder_bias = weight(E * width, wanted=with_decoder)
        self.router = weight(E, width, wanted=config.router == "linear")
        self.act = ACT2FN[config.activation]
        self.watched = False
        self.routed: RouterStats | None = None
        self._moments: tuple[Any, tuple[Tensor, ...]] | None = None

    def bias(self, of: Literal["encoder", "factor", "decoder"]) -> Tensor | None:
        """Return biases by expert, a view: [E, F], of the decoder [E, D]; None where there are none."""
        bias: Tensor | None = getattr(self, f"{of}_bias")
        return None if bias is None else bias.view(self.config.experts, -1)

    def moments(self) -> tuple[Tensor, ...]:
        """Return the moments of the encoders; see `routing.moments`."""
        own = [p for p in (self.encoder, self.encoder_bias) if p is not None]
        if self.training or torch.is_grad_enabled() or any(p.is_inference() for p in own):
            self._moments = None
            return moments(self.encoder, self.bias("encoder"))
        state = [(p._version, p.data_ptr(), p.dtype) for p in own]
        if self._moments is None or self._moments[0] != state:
            self._moments = (state, moments(self.encoder, self.bias("encoder")))
        return self._moments[1]

    def scores(self, x_TD: Tensor) -> Tensor:
        """Return the experts' scores over the temperature, in float32 or wider [T, E]."""
        # In half precision, as under autocast, close scores would coincide.
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.router is None:
                scores_TE = sparsity_scores(x_TD, self.moments())
            else:
                wide = torch.promote_types(self.router.dtype, torch.float32)
                scores_TE = F.linear(x_TD.to(wide), self.router.to(wide))
            return scores_TE / self.config.temperature

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return y [B, L, D]; any leading dimensions."""
        x_TD = x_BLD.reshape(-1, self.width)
        scores_TE = self.scores(x_TD)
        chosen_TK, gates_TK = choose(scores_TE, self.config.active, self.config.gates)
        order_R, token_R, counts_E = self._by_expert(chosen_TK)
        pre_RF, z_RF = self._units(x_TD.index_select(0, token_R), counts_E)
        y_RD = grouped_linear(z_RF, self.decoder, counts_E, self.bias("decoder"))
        # Back in the order of the tokens: a sum over K, whose order is the same on every device.
        y_TKD = y_RD.index_select(0, order_R.argsort()).view(*chosen_TK.shape, self.width)
        y_TD = (y_TKD * gates_TK[..., None].to(y_TKD.dtype)).sum(1)
        if self.watched:
            self.routed = self._stats(scores_TE, chosen_TK, gates_TK, pre_RF.detach() > 0, order_R, counts_E)
        return F.dropout(y_TD, self.config.dropout, self.training).view(*x_BLD.shape[:-1], self.width)

    def _by_expert(self, chosen_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the choices sorted by expert, their tokens, and the number of each expert."""
        order_R = chosen_TK.flatten().argsort(stable=True)
        return (
            order_R,
            order_R // self.config.active,
            torch.bincount(chosen_TK.flatten(), minlength=self.config.experts),
        )

    def _units(self, x_RD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        """Return pre-activations and units [R, F] of rows that are sorted by expert."""
        pre_RF = grouped_linear(x_RD, self.encoder, counts_E, self.bias("encoder"))
        z_RF = self.act(pre_RF)
        if self.factor is not None:
            z_RF = z_RF * grouped_linear(x_RD, self.factor, counts_E, self.bias("factor"))
        return pre_RF, z_RF

    @torch.no_grad()
    def _stats(
        self, scores_TE: Tensor, chosen_TK: Tensor, gates_TK: Tensor, on_RF: Tensor, order_R: Tensor, counts_E: Tensor
    ) -> RouterStats:
        fired_R = torch.empty_like(order_R).index_copy_(0, order_R, on_RF.sum(1))
        expert_R = torch.arange(len(counts_E), device=counts_E.device).repeat_interleave(counts_E)
        fired_EF = torch.zeros(len(counts_E), on_RF.shape[1], device=on_RF.device).index_add_(
            0, expert_R, on_RF.float()
        )
        return RouterStats(scores_TE, chosen_TK, gates_TK.detach(), fired_R.view_as(chosen_TK), fired_EF)

    @torch.no_grad()
    def features(self, x_BLD: Tensor) -> Tensor:
        """Return the units of all experts, each times its expert's gate, 0 where that was not chosen [B, L, N].

        With `wide_decoder` they are the layer: y = W z, one sparse MLP of width N (biases of the decoder aside). Only
        with the gate are the units of different tokens on one scale.

        Args:
            x_BLD: input of the layer; any leading dimensions.
        """
        x_TD = x_BLD.reshape(-1, self.width)
        chosen_TK, gates_TK = choose(self.scores(x_TD), self.config.active, self.config.gates)
        order_R, token_R, counts_E = self._by_expert(chosen_TK)
        _, z_RF = self._units(x_TD[token_R], counts_E)
        z_TEF = z_RF.new_zeros(len(x_TD), self.config.experts, self.config.units)
        z_TEF[token_R, chosen_TK.flatten()[order_R]] = z_RF * gates_TK.flatten()[order_R, None].to(z_RF.dtype)
        return z_TEF.view(*x_BLD.shape[:-1], -1)

    @torch.no_grad()
    def active_units(self, x_BD: Tensor) -> Tensor:
        """Return which units take part in a token's output, bool [B, N]: those of its experts that are not 0."""
        return self.features(x_BD) != 0

    def wide_decoder(self) -> Tensor:
        """Return [W_dec,1 ... W_dec,E] [D, N], the matrix that `features` are multiplied with."""
        return self.decoder.transpose(0, 1).flatten(1)

    def extra_repr(self) -> str:
        """Return sizes and kinds."""
        return ", ".join(f"{name}={value}" for name, value in asdict(self.config).items())


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Return the layers of experts in a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
