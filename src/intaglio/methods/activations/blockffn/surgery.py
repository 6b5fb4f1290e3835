"""Layers in a checkpoint: how wide they are, put in the place of the blocks' MLPs, and put in again empty.

Dimension letters: D width, E experts, H inner features of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from intaglio.errors import IntaglioError
from intaglio.methods.activations.blockffn.layer import BlockFFNLayer
from intaglio.methods.activations.blockffn.routing import Form
from intaglio.modeling.anatomy import Anatomy, anatomy
from intaglio.modeling.replacement import replace_modules
from intaglio.trainer.rng import generator


def layers_of(model: nn.Module) -> dict[str, BlockFFNLayer]:
    """The layers in a model, by where they stand.

    Args:
        model: any.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, BlockFFNLayer)}


def expert_width(parts: Anatomy, experts: int) -> int:
    """H such that a layer has about as many numbers as the first block's MLP: 2 D E H, at least 1.

    At the sizes of the paper's models, whose MLPs would be of width 8/3 D, this is what the paper has.

    Args:
        parts: of the model, whose MLPs are its own.
        experts: E.
    """
    numbers = sum(rows * columns for rows, columns in (one.shape for one in parts.linears(0) if one.part == "mlp"))
    return max(1, round(numbers / (2 * int(parts.config.hidden_size) * experts)))


def put_layers(parts: Anatomy, form: Form, std: float, seed: int, router_std: float | None = None) -> None:
    """Put layers with random weights in the place of every block's MLP.

    Args:
        parts: of the model.
        form: of the layers.
        std: of the weights.
        seed: of the draws.
        router_std: of the routers. Default: as the others.
    """
    width = int(parts.config.hidden_size)
    like = next(parts.blocks[0].parameters())
    found: dict[str, nn.Module] = {}
    for index, (block, where) in enumerate(parts.feed_forwards()):
        with torch.device("meta"):  # nothing is drawn from the global generator
            layer = BlockFFNLayer(width, form)
        layer.to(like.dtype).to_empty(device=like.device)
        layer.draw(std, generator(seed, BlockFFNLayer.slug, index), router_std)
        found |= where.puts(block, layer)
    replace_modules(parts.model, found)


def part_of(form: Form) -> dict[str, Any]:
    """The live part of the record.

    Args:
        form: of the layers.
    """
    return asdict(form)


def build_empty(part: Mapping[str, Any], model: nn.Module) -> None:
    """Put empty layers into a model without weights.

    Args:
        part: from `part_of`.
        model: on the meta device.
    """
    form = Form(**{name: value for name, value in part.items() if name != "slug"})
    with torch.device("cpu"):  # which rows of a fused module are whose is looked at
        parts = anatomy(model)
        places = parts.feed_forwards()
    for block, where in places:
        with torch.device("meta"):
            layer = BlockFFNLayer(int(parts.config.hidden_size), form)
        replace_modules(model, where.puts(block, layer.to(next(parts.blocks[0].parameters()).dtype)))


def check_fits(there: Mapping[str, BlockFFNLayer], wanted: Mapping[str, Any]) -> Form:
    """The form of layers that are there already, refused where another is asked for.

    Args:
        there: the layers.
        wanted: fields of `Form`; None: whatever there is.

    Raises:
        IntaglioError: names the first field that differs.
    """
    form = next(iter(there.values())).form
    for name, value in wanted.items():
        found = getattr(form, name)
        if value is not None and value != found:
            raise IntaglioError(f"{name} is {value}, and the layers of the model were made with {name}: {found}")
    return form


__all__ = ["build_empty", "check_fits", "expert_width", "layers_of", "part_of", "put_layers"]
