"""What stands in the place of an MLP: experts and their router.

Dimension letters: B any leading dimensions, T tokens, E experts, K chosen experts of a token, R = T K rows of them, F
units of an expert, D width, N = E F all units.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from intaglio.kernels.grouped_mm import grouped_linear
from intaglio.methods.activations.moe_x.routing import Gates, choose, entropy, fires, loads, moments, sparsity_scores
from intaglio.modeling.replacement import ReplacedMLP

Router = Literal["sparsity", "linear"]


@dataclass(frozen=True)
class Form:
    """What the experts of a layer are: data that a record holds and a layer is built from.

    Args:
        hidden: D.
        units: F.
        experts: E.
        active: K.
        activation: as transformers spells it.
        router: `sparsity` (no weights of its own) or `linear`.
        gates: a softmax over the `chosen` scores or over `all`.
        temperature: that scores are divided by.
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
    def of(cls, part: dict[str, Any]) -> Form:
        """The form that a record holds.

        Args:
            part: from `as_data`.
        """
        return cls(**{**part, "biases": tuple(part["biases"])})

    def as_data(self) -> dict[str, Any]:
        """As a record holds it."""
        return {**asdict(self), "biases": list(self.biases)}

    @property
    def expert_parameters(self) -> int:
        """Numbers of one expert."""
        encoder, factor, decoder = self.biases
        matrices = (2 + self.factor) * self.units * self.hidden
        return matrices + (encoder + (factor and self.factor)) * self.units + decoder * self.hidden


@dataclass(frozen=True, eq=False)
class Routed:
    """What a pass of a layer did, for the loss that balances and for who looks on.

    Args:
        scores_TE: over the temperature; the gradient reaches the router through them.
        chosen_TK: experts of each token.
        gates_TK: what their outputs were multiplied with.
        fired_TK: units of each of them that fired.
        fired_EF: for how many tokens each unit fired.
    """

    scores_TE: Tensor
    chosen_TK: Tensor
    gates_TK: Tensor
    fired_TK: Tensor
    fired_EF: Tensor

    def kept(self, real_T: Tensor | None) -> Routed:
        """The same without some tokens, as far as it is known by token.

        Args:
            real_T: bool, those that stay. None, or a mask of another pass than this one: all do.
        """
        if real_T is None or len(real_T) != len(self.scores_TE):
            return self
        return replace(
            self,
            scores_TE=self.scores_TE[real_T],
            chosen_TK=self.chosen_TK[real_T],
            gates_TK=self.gates_TK[real_T],
            fired_TK=self.fired_TK[real_T],
        )

    @torch.no_grad()
    def told(self, form: Form) -> dict[str, float]:
        """What a log says of it: `load entropy`, `L0`, `silent units`, and with a sparsity router `expected L0`.

        Args:
            form: of the layer.
        """
        found = {
            "load entropy": entropy(loads(self.chosen_TK, form.experts)),
            "L0": float(self.fired_TK.sum(1).double().mean()),
            "silent units": float((self.fired_EF == 0).double().mean()),
        }
        if form.router == "sparsity":
            share_TK = fires(self.scores_TE * form.temperature).gather(1, self.chosen_TK)
            found["expected L0"] = form.units * float(share_TK.double().sum(1).mean())
        return found


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
        form: sizes and kinds.
        device: of the weights. Default: torch's.
        dtype: of the weights. Default: torch's.
    """

    slug: ClassVar[str] = "moe_x"

    def __init__(self, form: Form, device: Any = None, dtype: Any = None) -> None:
        super().__init__(form.hidden)
        self.form = form
        E, units, width = form.experts, form.units, form.hidden
        with_encoder, with_factor, with_decoder = form.biases

        def weight(*sizes: int, wanted: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(sizes, device=device, dtype=dtype)) if wanted else None

        self.encoder = nn.Parameter(torch.zeros((E, units, width), device=device, dtype=dtype))
        # Biases of all experts in one row: two dimensions would make them a matrix, which decays in training.
        self.encoder_bias = weight(E * units, wanted=with_encoder)
        self.factor = weight(E, units, width, wanted=form.factor)
        self.factor_bias = weight(E * units, wanted=form.factor and with_factor)
        self.decoder = nn.Parameter(torch.zeros((E, width, units), device=device, dtype=dtype))
        self.decoder_bias = weight(E * width, wanted=with_decoder)
        self.router = weight(E, width, wanted=form.router == "linear")
        self.act = ACT2FN[form.activation]
        self.watched = False
        """Whether passes leave `routed` behind."""
        self.routed: Routed | None = None
        self._moments: tuple[Any, tuple[Tensor, ...]] | None = None

    def bias(self, of: Literal["encoder", "factor", "decoder"]) -> Tensor | None:
        """Biases by expert, a view: [E, F], of the decoder [E, D]; None where there are none.

        Args:
            of: whose.
        """
        found: Tensor | None = getattr(self, f"{of}_bias")
        return None if found is None else found.view(self.form.experts, -1)

    def moments(self) -> tuple[Tensor, ...]:
        """The moments of the encoders; see `routing.moments`."""
        own = [p for p in (self.encoder, self.encoder_bias) if p is not None]
        if self.training or torch.is_grad_enabled() or any(p.is_inference() for p in own):
            self._moments = None
            return moments(self.encoder, self.bias("encoder"))
        state = [(p._version, p.data_ptr(), p.dtype) for p in own]
        if self._moments is None or self._moments[0] != state:
            self._moments = (state, moments(self.encoder, self.bias("encoder")))
        return self._moments[1]

    def scores(self, x_TD: Tensor) -> Tensor:
        """What experts are chosen by, over the temperature, in float32 or more [T, E].

        Args:
            x_TD: what enters.
        """
        # Autocast would take the products of the router in half precision, where close scores fall together.
        with torch.autocast(x_TD.device.type, enabled=False):
            if self.router is None:
                scores_TE = sparsity_scores(x_TD, self.moments())
            else:
                wide = torch.promote_types(self.router.dtype, torch.float32)
                scores_TE = F.linear(x_TD.to(wide), self.router.to(wide))
            return scores_TE / self.form.temperature

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return y [B, L, D].

        Args:
            x_BLD: the hidden state; any leading dimensions.
        """
        x_TD = x_BLD.reshape(-1, self.width)
        scores_TE = self.scores(x_TD)
        chosen_TK, gates_TK = choose(scores_TE, self.form.active, self.form.gates)
        order_R, token_R, counts_E = self._by_expert(chosen_TK)
        pre_RF, z_RF = self._units(x_TD.index_select(0, token_R), counts_E)
        y_RD = grouped_linear(z_RF, self.decoder, counts_E, self.bias("decoder"))
        # Back in the order of the tokens: a sum over K, whose order is the same on every device.
        y_TKD = y_RD.index_select(0, order_R.argsort()).view(*chosen_TK.shape, self.width)
        y_TD = (y_TKD * gates_TK[..., None].to(y_TKD.dtype)).sum(1)
        if self.watched:
            self.routed = self._seen(scores_TE, chosen_TK, gates_TK, pre_RF.detach() > 0, order_R, counts_E)
        return F.dropout(y_TD, self.form.dropout, self.training).view(*x_BLD.shape[:-1], self.width)

    def _by_expert(self, chosen_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The choices with those of one expert side by side, their tokens, and how many each expert has."""
        order_R = chosen_TK.flatten().argsort(stable=True)
        return order_R, order_R // self.form.active, torch.bincount(chosen_TK.flatten(), minlength=self.form.experts)

    def _units(self, x_RD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations and units [R, F] of rows that lie by expert."""
        pre_RF = grouped_linear(x_RD, self.encoder, counts_E, self.bias("encoder"))
        z_RF = self.act(pre_RF)
        if self.factor is not None:
            z_RF = z_RF * grouped_linear(x_RD, self.factor, counts_E, self.bias("factor"))
        return pre_RF, z_RF

    @torch.no_grad()
    def _seen(
        self, scores_TE: Tensor, chosen_TK: Tensor, gates_TK: Tensor, on_RF: Tensor, order_R: Tensor, counts_E: Tensor
    ) -> Routed:
        fired_R = torch.empty_like(order_R).index_copy_(0, order_R, on_RF.sum(1))
        of_R = torch.arange(len(counts_E), device=counts_E.device).repeat_interleave(counts_E)
        fired_EF = torch.zeros(len(counts_E), on_RF.shape[1], device=on_RF.device).index_add_(0, of_R, on_RF.float())
        return Routed(scores_TE, chosen_TK, gates_TK.detach(), fired_R.view_as(chosen_TK), fired_EF)

    @torch.no_grad()
    def features(self, x_BLD: Tensor) -> Tensor:
        """The units of all experts, each times its expert's gate, 0 where that was not chosen [B, L, N].

        With `wide_decoder` they are the layer: y = W z, one sparse MLP of width N (biases of the decoder aside). Only
        with the gate in them are the units of different tokens on one scale.

        Args:
            x_BLD: what enters the layer; any leading dimensions.
        """
        x_TD = x_BLD.reshape(-1, self.width)
        chosen_TK, gates_TK = choose(self.scores(x_TD), self.form.active, self.form.gates)
        order_R, token_R, counts_E = self._by_expert(chosen_TK)
        _, z_RF = self._units(x_TD[token_R], counts_E)
        z_TEF = z_RF.new_zeros(len(x_TD), self.form.experts, self.form.units)
        z_TEF[token_R, chosen_TK.flatten()[order_R]] = z_RF * gates_TK.flatten()[order_R, None].to(z_RF.dtype)
        return z_TEF.view(*x_BLD.shape[:-1], -1)

    @torch.no_grad()
    def active(self, x_BD: Tensor) -> Tensor:
        """Which units take part in a token's output, bool [B, N]: those of its experts whose activation is not 0.

        Args:
            x_BD: what enters the layer; any leading dimensions.
        """
        return self.features(x_BD) != 0

    def wide_decoder(self) -> Tensor:
        """[W_dec,1 ... W_dec,E] [D, N]: what `features` are multiplied with."""
        return self.decoder.transpose(0, 1).flatten(1)

    def extra_repr(self) -> str:
        """Sizes and kinds."""
        return ", ".join(f"{name}={value}" for name, value in asdict(self.form).items())


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The layers of experts in a model, by where they stand.

    Args:
        model: any.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


__all__ = ["Form", "MoELayer", "Routed", "Router", "moe_layers"]
