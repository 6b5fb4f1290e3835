"""LoRA through PEFT, merged when the run ends; the zeros of pruned layers stay zeros.

    W' = W + scale B A              (Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022)
    W' = W + mask * (scale B A)     where W is pruned: mask is where W is not zero, in training as in merging

The embedding and head rows of tokens that an objective has just added are trained as they are; others stay.

Dimension letters: O outputs, I inputs of a layer, V vocabulary, N new tokens, D width, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from intaglio.errors import IntaglioError, did_you_mean
from intaglio.modeling.anatomy import blocks as blocks_of
from intaglio.modeling.classifier import head_modules
from intaglio.trainer.rng import generator
from intaglio.trainer.sparsity_mask import linear_modules, pruned_mask

ADAPTER = "default"


class Lora(BaseModel):
    """Low-rank adapters instead of full training.

    Args:
        r: rank. Default 16.
        alpha: scale times r. Default: twice r.
        dropout: on the adapters' inputs. Default 0.
        targets: layers to adapt, by the last part of their names, such as `q_proj`. Default: every linear layer but the
            head. Rows of tokens that the objective adds to the vocabulary are trained too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    r: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[int, Field(ge=1)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: list[str] | None = None

    def names(self, model: nn.Module, blocks: int | None = None) -> list[str]:
        """Return the names of the layers to adapt, `blocks`: in so many of the last blocks alone."""
        every = linear_modules(model)
        if not every:
            raise IntaglioError("lora: the model has no linear layer left to adapt: its projections were replaced")
        last = {name.rpartition(".")[2] for name in every}
        unknown = [target for target in self.targets or () if target not in last]
        if unknown or self.targets == []:
            target = unknown[0] if unknown else "nothing"
            raise IntaglioError(f"lora: no linear layer is named {target!r}; {did_you_mean(target, last)}")
        kept = every.values() if blocks is None else [m for b in last_blocks(model, blocks) for m in b.modules()]
        inside = set(map(id, kept))
        chosen = [name for name in every if self.targets is None or name.rpartition(".")[2] in self.targets]
        return [name for name in chosen if id(every[name]) in inside]

    def check(self, model: nn.Module) -> None:
        """Refuse a missing PEFT, or a target that the model does not have."""
        if find_spec("peft") is None:
            raise IntaglioError("lora needs the package peft: pip install 'intaglio[train]'")
        self.names(model)


def last_blocks(model: nn.Module, count: int) -> list[nn.Module]:
    """Return the last transformer blocks of a model.

    Raises:
        IntaglioError: it has fewer.
    """
    every = blocks_of(model)
    if count > len(every):
        raise IntaglioError(f"trainable_blocks is {count}; the model has {len(every)} blocks")
    return every[len(every) - count :]


@contextmanager
def adapted(
    model: nn.Module,
    lora: Lora | None,
    *,
    keep_mask: bool,
    seed: int,
    blocks: int | None = None,
    new_tokens: Sequence[int] = (),
) -> Iterator[None]:
    """Put adapters into a model, and merge them when the context ends; after an error remove them unmerged.

    Everything else is frozen inside, but for the head of a classifier and the rows of `new_tokens`. `lora` None:
    do nothing. `blocks`: adapt so many of the last blocks alone.
    """
    if lora is None:
        yield
        return
    layers = _inject(model, lora, seed, blocks)
    for head in head_modules(model):  # they are new
        head.requires_grad_(True)
    masks = {name: pruned_mask(layer.base_layer.weight) if keep_mask else None for name, layer in layers.items()}
    for name, layer in layers.items():
        if masks[name] is not None:
            _mask_forward(layer, masks[name])
    try:
        with _trained_rows(model, new_tokens):
            yield
        for name, layer in layers.items():
            _merge(layer, masks[name])
    finally:
        for name, layer in layers.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.base_layer)
        vars(model).pop("peft_config", None)


@contextmanager
def _trained_rows(model: Any, tokens: Sequence[int]) -> Iterator[None]:
    """Train a change of the embedding and head rows of some tokens, and add it to them when the context ends."""
    if not tokens:
        yield
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ids_N = torch.tensor(sorted(tokens), device=embedding.weight.device)
    with torch.no_grad():
        factor = float(embedding(ids_N).norm() / embedding.weight[ids_N].norm())  # not 1 in Gemma

    def embed(module: Any, args: Any, output_BTD: Tensor) -> Tensor:
        same_BTN = (args[0][..., None] == ids_N).to(output_BTD.dtype)
        return output_BTD + factor * same_BTN @ module.new_rows.to(output_BTD.dtype)

    def read(module: Any, args: Any, output_BTV: Tensor) -> Tensor:
        return output_BTV.index_add(-1, ids_N, F.linear(args[0], module.new_rows.to(args[0].dtype)))

    tied = head is not None and head.weight is embedding.weight
    modules = [embedding] if head is None else [embedding, head]
    for module in modules:
        changes_ND = torch.zeros(len(ids_N), module.weight.shape[1], device=ids_N.device)
        module.new_rows = embedding.new_rows if tied and module is head else nn.Parameter(changes_ND)
    handles = [module.register_forward_hook(hook) for module, hook in zip(modules, (embed, read), strict=False)]
    try:
        yield
        with torch.no_grad():
            for module in modules[:1] if tied else modules:
                module.weight[ids_N] += module.new_rows.to(module.weight.dtype)
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            del module.new_rows


def _inject(model: nn.Module, lora: Lora, seed: int, blocks: int | None) -> dict[str, Any]:
    from peft import LoraConfig, inject_adapter_in_model  # optional, and slow to import

    names = lora.names(model, blocks)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha or 2 * lora.r,
        lora_dropout=lora.dropout,
        target_modules=names,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    layers = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        # PEFT draws from the global generator, in the dtype of the layer.
        a, b = (getattr(layer, part)[ADAPTER] for part in ("lora_A", "lora_B"))
        a.float(), b.float()
        bound = a.weight.shape[1] ** -0.5
        drawn = torch.rand(a.weight.shape, generator=generator(seed, "lora", name))
        with torch.no_grad():
            a.weight.copy_((2 * drawn - 1) * bound)
    return layers


def _delta(layer: Any, mask_OI: Tensor | None) -> Tensor:
    """Return the adapter's update of the weight, in its layout, zero where the mask is False."""
    delta: Tensor = layer.get_delta_weight(ADAPTER)
    return delta if mask_OI is None else delta * mask_OI


def _mask_forward(layer: Any, mask_OI: Tensor | None) -> None:
    """Mask the update in the forward pass too, through PEFT's hook for variants of LoRA."""
    from peft.tuners.lora.layer import LoraVariant

    class Masked(LoraVariant):
        @staticmethod
        def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **more: Any) -> Tensor:
            delta = _delta(module, mask_OI)
            x = module.lora_dropout[active_adapter](x.to(delta.dtype))
            added = x @ delta if isinstance(module.base_layer, Conv1D) else F.linear(x, delta)
            return result + added

    layer.lora_variant[ADAPTER] = Masked()


@torch.no_grad()
def _merge(layer: Any, mask_OI: Tensor | None) -> None:
    weight = layer.base_layer.weight
    merged = (weight.float() + _delta(layer, mask_OI).float()).to(weight.dtype)
    weight.copy_(merged)
