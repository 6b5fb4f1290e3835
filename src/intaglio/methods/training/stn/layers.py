"""Gated layers of STN, wrapped around stock linear layers, convolutions, embeddings and LSTMs, and removed again.

Dimension letters: B examples, H hyperparameters, M output units or channels, T time steps, I inputs, D hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import blocks
from intaglio.modeling.replacement import REPLACED, replace_modules
from intaglio.modeling.targets import check_patterns, refuse_tied, select_layers

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SINGLE = (nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS)
GATEABLE = (*SINGLE, nn.LSTM)


@dataclass
class HypernetInput:
    """State of a pass that all gated layers and regularizers of a model read.

    `h_BH` is the input of the hypernetwork, a row for each example or one for all; `values_BH` are the values of the
    hyperparameters, None where nothing is regularized. `drop_connect` names the hyperparameter of a layer's weights.
    """

    h_BH: Tensor
    values_BH: Tensor | None = None
    drop_connect: dict[int, int] = field(default_factory=dict)
    penalties: list[Tensor] = field(default_factory=list)
    _masks: dict[int, Tensor] = field(default_factory=dict)

    def set(self, h_BH: Tensor, values_BH: Tensor | None = None) -> None:
        """Begin a pass."""
        self.h_BH, self.values_BH = h_BH, values_BH
        self._masks.clear()
        self.penalties.clear()

    def weight_mask(self, layer: nn.Module, weight: Tensor) -> Tensor | None:
        """Return the DropConnect mask of a layer, one for the whole pass, or None."""
        index = self.drop_connect.get(id(layer))
        if index is None or self.values_BH is None or not layer.training:
            return None
        if id(layer) not in self._masks:
            p = self.values_BH[0, index]
            self._masks[id(layer)] = (torch.rand_like(weight) >= p) / (1 - p)
        return self._masks[id(layer)]


def for_rows(values_B: Tensor, x: Tensor, name: str = "a layer") -> Tensor:
    """Return values [B, ...] of examples for the rows of a tensor, whose first dimension is B, or B times some number.

    Raises:
        IntaglioError: the rows are no multiple of B.
    """
    rows, count = x.shape[0], values_B.shape[0]
    if count == 1 or rows in (1, count):
        return values_B
    if rows % count:
        raise IntaglioError(f"{name} has an input of {rows} rows for {count} examples; stn needs the batch first")
    return values_B.repeat_interleave(rows // count, dim=0)


class GatedLayer(nn.Module):
    """A stock layer with a second weight, whose output units are gated by a linear function of the hyperparameters.

        out = e0 (x W_e^T + b_e) + u_w(h) * (x W_h^T) + u_b(h) * b_h,    [u_w, u_b] = h U^T

    Per example this is a layer with the weight rows `e0 W_e[i] + (U h)_i W_h[i]`. Gates are per output channel of a
    convolution, and per dimension of an embedding, which has no bias.

    Args:
        elementary: the stock layer with W_e and b_e, kept as it is inside.
        width: H; 0: no gates, the layer alone under DropConnect.
        state: input of the hypernetwork.
        gate_std: standard deviation of the initial U.
        generator: of the initial values.
    """

    def __init__(
        self, elementary: nn.Module, width: int, state: HypernetInput, gate_std: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.elementary, self.width = elementary, width
        self._state = [state]  # in a list: neither a submodule nor copied into the state dict
        weight: Tensor = elementary.weight  # type: ignore[assignment]
        self.transposed = isinstance(elementary, (Conv1D, nn.Embedding))
        units = weight.shape[1 if self.transposed else 0]
        bias: Any = getattr(elementary, "bias", None)
        if not width:
            return
        fan_in = weight.shape[0] if self.transposed else weight[0].numel()
        bound = 0.1 if isinstance(elementary, nn.Embedding) else fan_in**-0.5
        self.hyper_weight = self._parameter(weight, (2 * torch.rand(weight.shape, generator=generator) - 1) * bound)
        drawn = (2 * torch.rand(units, generator=generator) - 1) * bound
        self.hyper_bias = None if bias is None else self._parameter(weight, drawn)
        gates = torch.randn((1 + (bias is not None)) * units, width, generator=generator) * gate_std
        self.gate_weight, self.scale = self._parameter(weight, gates), self._parameter(weight, torch.ones(()))

    @staticmethod
    def _parameter(like: Tensor, value: Tensor) -> nn.Parameter:
        return nn.Parameter(value.to(like.device, torch.float32))

    @property
    def stock(self) -> nn.Module:
        """The stock layer as it is."""
        return self.elementary

    @property
    def weight(self) -> Any:
        """The weight of the stock layer, W_e."""
        return self.elementary.weight

    @property
    def bias(self) -> Any:
        """The bias of the stock layer, b_e, or None."""
        return getattr(self.elementary, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for the current input of the hypernetwork."""
        mask = self._state[0].weight_mask(self, self.weight)
        if not self.width:
            return self._multiply(x, mask, {})
        out = self.scale * self._multiply(x, mask, {})
        u_BG = self._state[0].h_BH @ self.gate_weight.T
        units = out.shape[1] if isinstance(self.elementary, CONVOLUTIONS) else out.shape[-1]
        zero_bias = {} if self.bias is None else {"bias": torch.zeros_like(self.bias)}
        # In the dtype of the stock layer: a frozen one may be half precision.
        hyper = self._multiply(x, mask, {"weight": self.hyper_weight.to(self.weight.dtype), **zero_bias})
        gated = self._spread(u_BG[:, :units], out) * hyper
        if self.hyper_bias is not None:
            gated = gated + self._spread(u_BG[:, units:] * self.hyper_bias, out)
        return out + gated.to(out.dtype)

    def _multiply(self, x: Tensor, mask: Tensor | None, tensors: dict[str, Tensor]) -> Tensor:
        if mask is not None:
            tensors = {**tensors, "weight": tensors.get("weight", self.weight) * mask}
        result: Tensor = functional_call(self.elementary, tensors, (x,)) if tensors else self.elementary(x)
        return result

    def _spread(self, u_BM: Tensor, out: Tensor) -> Tensor:
        """Return gates in a shape that multiplies an output."""
        u_BM = for_rows(u_BM, out, type(self.elementary).__name__)
        if isinstance(self.elementary, CONVOLUTIONS):
            return u_BM.reshape(*u_BM.shape, *[1] * (out.ndim - 2))
        return u_BM.reshape(len(u_BM), *[1] * (out.ndim - 2), u_BM.shape[1])

    def effective(self, h_H: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the stock layer that computes the same for unconstrained hyperparameters."""
        if not self.width:
            return self.weight, self.bias
        u_G, units = self.gate_weight @ h_H, self.weight.shape[1 if self.transposed else 0]
        gate = u_G[:units] if self.transposed else u_G[:units].reshape(-1, *[1] * (self.weight.ndim - 1))
        weight = self.scale * self.weight + gate * self.hyper_weight
        return weight, None if self.hyper_bias is None else self.scale * self.bias + u_G[units:] * self.hyper_bias

    @torch.no_grad()
    def bake(self, h_H: Tensor) -> nn.Module:
        """Write the effective weight for unconstrained hyperparameters into the stock layer, and return that."""
        weight, bias = self.effective(h_H)
        self.elementary.weight.copy_(weight)  # type: ignore[operator]
        if bias is not None:
            self.elementary.bias.copy_(bias)  # type: ignore[operator]
        return self.elementary


class GatedLSTM(nn.Module):
    """An `nn.LSTM` whose products with input and hidden state are gated layers, as a loop over time.

    `input_layers` and `hidden_layers` hold those of each layer (and direction), which share their parameters with the
    stock LSTM.

    Args:
        lstm: the stock LSTM; a projection of the hidden state is refused.
        gated: makes the gated layer of a linear layer.
    """

    def __init__(self, lstm: nn.LSTM, gated: Callable[[nn.Module], GatedLayer]) -> None:
        super().__init__()
        if lstm.proj_size:
            raise IntaglioError(f"stn cannot gate an LSTM with proj_size {lstm.proj_size}; name it in ignore")
        self._stock = [lstm]  # in a list: its parameters are those of the layers below
        self.directions = 2 if lstm.bidirectional else 1
        self.input_layers, self.hidden_layers = nn.ModuleList(), nn.ModuleList()
        for layer in range(lstm.num_layers):
            for suffix in ("", "_reverse")[: self.directions]:
                for part, layers in (("ih", self.input_layers), ("hh", self.hidden_layers)):
                    names = [f"{kind}_{part}_l{layer}{suffix}" for kind in ("weight", "bias")]
                    layers.append(gated(_linear(*[getattr(lstm, name, None) for name in names])))

    @property
    def stock(self) -> nn.Module:
        """The stock LSTM as it is."""
        return self._stock[0]

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return what `nn.LSTM` returns for a batch of sequences."""
        lstm = self._stock[0]
        if isinstance(x, PackedSequence) or x.ndim != 3:
            raise IntaglioError("stn needs the input of an LSTM as a batch of padded sequences, three dimensions")
        x_BTI = x if lstm.batch_first else x.transpose(0, 1)
        zeros = x_BTI.new_zeros(len(self.input_layers), len(x_BTI), lstm.hidden_size)
        start_h, start_c = (zeros, zeros) if hx is None else hx
        last: list[tuple[Tensor, Tensor]] = []
        for layer in range(lstm.num_layers):
            if layer and lstm.dropout:
                x_BTI = F.dropout(x_BTI, lstm.dropout, self.training)
            outputs = []
            for direction in range(self.directions):
                n = layer * self.directions + direction
                own_BTI = x_BTI.flip(1) if direction else x_BTI
                out_BTD, state = self._run(n, own_BTI, start_h[n], start_c[n])
                outputs.append(out_BTD.flip(1) if direction else out_BTD)
                last.append(state)
            x_BTI = torch.cat(outputs, dim=-1)
        out = x_BTI if lstm.batch_first else x_BTI.transpose(0, 1)
        return out, (torch.stack([h for h, _ in last]), torch.stack([c for _, c in last]))

    def _run(self, n: int, x_BTI: Tensor, h_BD: Tensor, c_BD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        outputs = []
        for step_BG in self.input_layers[n](x_BTI).unbind(1):
            i_BD, f_BD, g_BD, o_BD = (step_BG + self.hidden_layers[n](h_BD)).chunk(4, dim=-1)
            c_BD = f_BD.sigmoid() * c_BD + i_BD.sigmoid() * g_BD.tanh()
            h_BD = o_BD.sigmoid() * c_BD.tanh()
            outputs.append(h_BD)
        return torch.stack(outputs, dim=1), (h_BD, c_BD)

    def bake(self, h_H: Tensor) -> nn.Module:
        """Write the effective weights into the stock LSTM, and return it."""
        for layer in (*self.input_layers, *self.hidden_layers):
            layer.bake(h_H)
        return self._stock[0]


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """Return a linear layer with these very parameters."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight, linear.bias = weight, bias
    return linear


def gateable(model: nn.Module, targets: Sequence[str] | None, ignore: Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers to gate by name: by default those of a transformer's blocks, or of any other module all.

    Raises:
        IntaglioError: a pattern names no layer, no layer is left, or a layer shares its weight with another module.
    """
    scopes = blocks(model) if isinstance(model, PreTrainedModel) and targets is None else [model]
    inside = {id(part) for scope in scopes for part in scope.modules()}
    replaced = {id(part) for module in model.modules() if isinstance(module, REPLACED) for part in module.modules()}
    every = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GATEABLE) and name and id(module) in inside - replaced and ".lora_" not in name
    }
    if not every:
        raise IntaglioError(f"{type(model).__name__} has no linear layer, convolution, embedding or LSTM to gate")
    names = list(every)
    check_patterns(names, {"targets": targets or [], "ignore": ignore})
    chosen = {names[n]: every[names[n]] for n in select_layers(names, targets, ignore)}
    if not chosen:
        raise IntaglioError("ignore names every layer; leave at least one to gate")
    refuse_tied(model, list(chosen.values()))
    return chosen


def install(
    model: nn.Module,
    layers: dict[str, nn.Module],
    width: int,
    state: HypernetInput,
    gate_std: float,
    generator: torch.Generator,
) -> dict[str, GatedLayer | GatedLSTM]:
    """Replace layers by gated ones, and return those by name."""

    def gated(module: nn.Module) -> GatedLayer:
        return GatedLayer(module, width, state, gate_std, generator)

    made = {n: GatedLSTM(m, gated) if isinstance(m, nn.LSTM) else gated(m) for n, m in layers.items()}
    replace_modules(model, made)
    return made


def remove(model: nn.Module, layers: dict[str, GatedLayer | GatedLSTM], h_H: Tensor | None) -> None:
    """Put the stock layers back, with the weights for unconstrained hyperparameters; None: as they are."""
    replace_modules(model, {n: layer.stock if h_H is None else layer.bake(h_H) for n, layer in layers.items()})
