"""Sparse upcycling: experts made from a dense MLP.

Dimension letters: E experts, F units of an expert, G units of the dense MLP, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from intaglio.checkpoint import DTYPES
from intaglio.errors import IntaglioError
from intaglio.methods.activations.moe_x.layers import MoELayer, MoELayerConfig
from intaglio.modeling.anatomy import MLP, Linear
from intaglio.trainer.rng import generator

Source = Literal["copy", "split"]


@dataclass(frozen=True)
class UpcycleConfig:
    """Initial weights of the experts; the fields are those of `MoEX`, `start` being `source`."""

    source: Source = "copy"
    noise: float = 0.0
    reset: float = 0.0
    router_std: float = 0.02
    seed: int = 0

    @torch.no_grad()
    def build(self, name: str, mlp: MLP, config: MoELayerConfig) -> MoELayer:
        """Return the experts that replace one MLP, on its device and in its dtype; `name` keys the random draws.

        Raises:
            IntaglioError: its weights are packed.
        """
        weight_GD = mlp.into.read()
        if weight_GD.dtype not in DTYPES.values():
            dtype = str(weight_GD.dtype).removeprefix("torch.")
            raise IntaglioError(f"{name} stores its weights as {dtype}; moe_x needs {', '.join(DTYPES)}")
        layer = MoELayer(config, device=weight_GD.device, dtype=weight_GD.dtype)
        draws = generator(self.seed, "moe_x", name)
        # The initial sum of the gates, and the number of experts with a unit that are chosen for it.
        gates = 1.0 if config.gates == "chosen" else config.active / config.experts
        scale = (config.active if self.source == "split" else 1.0) / gates
        layer.encoder.copy_(self._noisy(self._by_expert(weight_GD, config), draws))
        layer.decoder.copy_(scale * self._by_expert(mlp.out.read().T, config).transpose(1, 2))
        encoder_EF, factor_EF, decoder_ED = layer.bias("encoder"), layer.bias("factor"), layer.bias("decoder")
        if encoder_EF is not None:
            encoder_EF.copy_(self._by_expert(_bias(mlp.into), config))
        if mlp.factor is not None and layer.factor is not None:
            layer.factor.copy_(self._by_expert(mlp.factor.read(), config))
            if factor_EF is not None:
                factor_EF.copy_(self._by_expert(_bias(mlp.factor), config))
        if decoder_ED is not None:
            decoder_ED.copy_(_bias(mlp.out) / gates)
        self._reset_units(layer, draws)
        if layer.router is not None:
            layer.router.copy_(self.router_std * torch.randn(layer.router.shape, generator=draws))
        return layer.requires_grad_(bool(mlp.into.module.weight.requires_grad))

    def _by_expert(self, dense_G: Tensor, config: MoELayerConfig) -> Tensor:
        """Return values of the dense MLP's units [G, ...] by expert [E, F, ...]."""
        if self.source == "split":
            return dense_G.unflatten(0, (config.experts, config.units))
        return dense_G.expand(config.experts, *dense_G.shape)

    def _noisy(self, encoder_EFD: Tensor, draws: torch.Generator) -> Tensor:
        if not self.noise:
            return encoder_EFD
        noise_EFD = torch.randn(encoder_EFD.shape, generator=draws).to(encoder_EFD.device)
        return encoder_EFD.float() + self.noise * encoder_EFD.float().std(correction=0) * noise_EFD

    def _reset_units(self, layer: MoELayer, draws: torch.Generator) -> None:
        """Draw some units of each expert anew: normal, with the standard deviation of their matrix, biases 0."""
        count = round(self.reset * layer.config.units)
        if not count:
            return
        chosen_EC = torch.stack([torch.randperm(layer.config.units, generator=draws)[:count] for _ in layer.encoder])
        rows_E1 = torch.arange(layer.config.experts)[:, None]
        for weight in (layer.encoder, layer.factor, layer.decoder.transpose(1, 2)):
            if weight is not None:
                std = weight.float().std(correction=0).cpu()
                drawn_ECD = std * torch.randn(*chosen_EC.shape, layer.width, generator=draws)
                weight[rows_E1.to(weight.device), chosen_EC.to(weight.device)] = drawn_ECD.to(weight)
        for bias in (layer.bias("encoder"), layer.bias("factor")):
            if bias is not None:
                bias[rows_E1.to(bias.device), chosen_EC.to(bias.device)] = 0


def _bias(linear: Linear) -> Tensor:
    bias_O = linear.read_bias()
    assert bias_O is not None  # the config says which there are
    return bias_O
