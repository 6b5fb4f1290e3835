"""Experts out of a dense MLP, put into a model, and put in again empty for a reload.

Dimension letters: E experts, F units of an expert, G units of the dense MLP, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intaglio.checkpoint import DTYPES
from intaglio.errors import IntaglioError
from intaglio.methods.activations.moe_x.layer import Form, MoELayer, moe_layers
from intaglio.modeling.anatomy import MLP, Anatomy, Linear, anatomy
from intaglio.modeling.replacement import module_names, replace_modules
from intaglio.trainer.rng import generator

By = Literal["copy", "split"]


@dataclass(frozen=True)
class Start:
    """What the experts begin as; see `MoEX`.

    Args:
        by: `copy`, every expert is the whole MLP, or `split`, each has its share of the units.
        noise: on the encoders, over their standard deviation.
        reset: share of each expert's units that are drawn anew.
        router_std: of a linear router's weights.
        seed: of what is drawn.
    """

    by: By = "copy"
    noise: float = 0.0
    reset: float = 0.0
    router_std: float = 0.02
    seed: int = 0

    @torch.no_grad()
    def layer(self, name: str, mlp: MLP, form: Form) -> MoELayer:
        """The experts that take the place of one MLP, on its device and in its dtype.

        Args:
            name: that random draws go by.
            mlp: is read.
            form: of the layer.

        Raises:
            IntaglioError: its weights are packed.
        """
        weight_GD = mlp.into.read()
        if weight_GD.dtype not in DTYPES.values():
            raise IntaglioError(
                f"{name} stores its weights as {str(weight_GD.dtype).removeprefix('torch.')}; moe_x needs "
                f"{', '.join(DTYPES)}"
            )
        made = MoELayer(form, device=weight_GD.device, dtype=weight_GD.dtype)
        draws = generator(self.seed, "moe_x", name)
        # The sum of the gates at the start, and how many of the experts that hold a unit are chosen for it.
        gates = 1.0 if form.gates == "chosen" else form.active / form.experts
        scale = (form.active if self.by == "split" else 1.0) / gates
        made.encoder.copy_(self._noisy(self._shared(weight_GD, form), draws))
        made.decoder.copy_(scale * self._shared(mlp.out.read().T, form).transpose(1, 2))
        encoder_EF, factor_EF, decoder_ED = made.bias("encoder"), made.bias("factor"), made.bias("decoder")
        if encoder_EF is not None:
            encoder_EF.copy_(self._shared(_bias(mlp.into), form))
        if mlp.factor is not None and made.factor is not None:
            made.factor.copy_(self._shared(mlp.factor.read(), form))
            if factor_EF is not None:
                factor_EF.copy_(self._shared(_bias(mlp.factor), form))
        if decoder_ED is not None:
            decoder_ED.copy_(_bias(mlp.out) / gates)
        self._redraw(made, draws)
        if made.router is not None:
            made.router.copy_(self.router_std * torch.randn(made.router.shape, generator=draws))
        return made.requires_grad_(bool(mlp.into.module.weight.requires_grad))

    def _shared(self, dense_G: Tensor, form: Form) -> Tensor:
        """What belongs to the units of the dense MLP [G, ...], by expert [E, F, ...]."""
        if self.by == "split":
            return dense_G.unflatten(0, (form.experts, form.units))
        return dense_G.expand(form.experts, *dense_G.shape)

    def _noisy(self, encoder_EFD: Tensor, draws: torch.Generator) -> Tensor:
        if not self.noise:
            return encoder_EFD
        noise_EFD = torch.randn(encoder_EFD.shape, generator=draws).to(encoder_EFD.device)
        return encoder_EFD.float() + self.noise * encoder_EFD.float().std(correction=0) * noise_EFD

    def _redraw(self, made: MoELayer, draws: torch.Generator) -> None:
        """Draw some units of each expert anew: normal, with the standard deviation of their matrix, biases 0."""
        count = round(self.reset * made.form.units)
        if not count:
            return
        chosen_EC = torch.stack([torch.randperm(made.form.units, generator=draws)[:count] for _ in made.encoder])
        rows_E1 = torch.arange(made.form.experts)[:, None]
        for weight in (made.encoder, made.factor, made.decoder.transpose(1, 2)):
            if weight is not None:
                std = weight.float().std(correction=0).cpu()
                drawn_ECD = std * torch.randn(*chosen_EC.shape, made.width, generator=draws)
                weight[rows_E1.to(weight.device), chosen_EC.to(weight.device)] = drawn_ECD.to(weight)
        for bias in (made.bias("encoder"), made.bias("factor")):
            if bias is not None:
                bias[rows_E1.to(bias.device), chosen_EC.to(bias.device)] = 0


def _bias(linear: Linear) -> Tensor:
    found = linear.read_bias()
    assert found is not None  # the form says which there are
    return found


def put_layers(parts: Anatomy, layers: Mapping[int, MoELayer]) -> None:
    """Put layers of experts in the place of MLPs.

    Args:
        parts: of the model.
        layers: by block.
    """
    where = module_names(parts.model)
    modules: dict[str, nn.Module] = {}
    for index, layer in layers.items():
        modules |= parts.mlp(index).where.puts(where[id(parts.blocks[index])], layer)
    replace_modules(parts.model, modules)


def build_empty(part: Mapping[str, Any], model: nn.Module) -> None:
    """Put empty layers into a model without weights.

    Args:
        part: of the record: `layers`, `[block, form]` of each.
        model: on the meta device.
    """
    with torch.device("cpu"):  # which rows of a fused module are whose is known without weights
        parts = anatomy(model)
        found = {int(index): parts.mlp(int(index)) for index, _ in part["layers"]}
    layers = {
        int(index): MoELayer(Form.of(form), device="meta", dtype=found[int(index)].into.module.weight.dtype)
        for index, form in part["layers"]
    }
    put_layers(parts, layers)


def restore_runtime(part: Mapping[str, Any], model: nn.Module) -> None:
    """See that the layers that a live part names are there, with their weights where torch itself would put them.

    Files are mapped into memory as they lie, and the product of an expert that has one token differs in its last bit
    with where its matrix begins.

    Args:
        part: of the record.
        model: just loaded.

    Raises:
        IntaglioError: it was loaded without the layers.
    """
    layers = moe_layers(model)
    if len(layers) != len(part["layers"]):
        raise IntaglioError(f"the model has {len(layers)} layers of moe_x where its record names {len(part['layers'])}")
    for layer in layers.values():
        for parameter in layer.parameters():
            parameter.data = parameter.data.clone()


def check_indices(indices: Sequence[int], blocks: int) -> None:
    """Refuse blocks that are not there, or are named twice.

    Args:
        indices: as a recipe has them.
        blocks: of the model.

    Raises:
        IntaglioError: names the first.
    """
    for place, index in enumerate(indices):
        if index >= blocks:
            raise IntaglioError(f"layers names {index}; the model has blocks 0 to {blocks - 1}")
        if index in indices[:place]:
            raise IntaglioError(f"layers names {index} twice")


__all__ = ["By", "Start", "build_empty", "check_indices", "put_layers", "restore_runtime"]
