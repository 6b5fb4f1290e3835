"""The common part of the exporters of quantized weights.

Dimension letters: O output features, I input features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from intaglio import atomic_io
from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.resolve import silence_transformers
from intaglio.errors import IntaglioError
from intaglio.methods.weights.bitnet import BitLinear, BitNet, PackedLinear, Quantization
from intaglio.modeling.replacement import FusedLinears, ReplacedLinear


@dataclass(frozen=True)
class Exported:
    """The quantized projections in a format.

    Args:
        tensors: by name, `{module}.{tensor}`.
        config: `quantization_config` of the configuration; empty for plain weights.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Projection:
    """A quantized projection of the stock model.

    Args:
        name: of its module.
        parts: its layers; several if it is fused.
        codes_OI: integer codes, int8.
        scale_O1: scale of each row, float32: a weight is code / scale.
        bias_O: bias or None.
    """

    name: str
    parts: tuple[BitLinear | PackedLinear, ...]
    codes_OI: Tensor
    scale_O1: Tensor
    bias_O: Tensor | None


def quantization_of(checkpoint: Checkpoint, format: str) -> Quantization:
    """Return the quantization of a checkpoint without other runtime parts; `format` is named in error messages.

    Raises:
        IntaglioError: nothing is quantized, or it has another runtime part.
    """
    slugs = [str(part.get("slug")) for part in checkpoint.record.live]
    other = [slug for slug in slugs if slug != BitNet.slug]
    if other:
        raise IntaglioError(f"the format {format} cannot represent the runtime part of {other[0]}")
    if not slugs:
        raise IntaglioError(
            f"nothing in the checkpoint is quantized, as the format {format} requires; quantize it with a bitnet step, "
            "or export plain weights as safetensors"
        )
    return Quantization(**checkpoint.record.live[0]["quantization"])


@torch.no_grad()
def projections(model: nn.Module) -> list[Projection]:
    """Return the quantized projections of a model, in the order of its modules."""
    quantized: list[Projection] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside or not isinstance(module, ReplacedLinear):
            continue
        inside.update(map(id, module.modules()))
        parts: Any = (module,)
        rows: Any = slice(None)
        if isinstance(module, FusedLinears):
            parts, rows = tuple(module.parts), module.places
        scales = [part.scale() if isinstance(part, BitLinear) else part.weight_scale for part in parts]
        scale_O1 = torch.cat([s.float().expand(part.out_features, 1) for s, part in zip(scales, parts, strict=True)])
        codes_OI = torch.cat([part.codes() for part in parts]).to(torch.int8)
        bias_O = None if parts[0].bias is None else torch.cat([part.bias for part in parts])[rows].cpu()
        quantized.append(Projection(name, parts, codes_OI[rows].cpu(), scale_O1[rows].cpu(), bias_O))
    return quantized


def stock_linears(checkpoint: Checkpoint, format: str, quantized: list[Projection]) -> list[str]:
    """Return the names of the stock model's linear layers that are not in `quantized`.

    Raises:
        IntaglioError: a quantized projection is not an `nn.Linear` in the stock model.
    """
    with torch.device("meta"):
        stock = type(checkpoint.model)(checkpoint.model.config)
    linears = [name for name, module in stock.named_modules() if isinstance(module, nn.Linear)]
    names = {projection.name for projection in quantized}
    other = sorted(names - set(linears))
    if other:
        raise IntaglioError(
            f"{other[0]} is a {type(stock.get_submodule(other[0])).__name__} in the stock model, which the format "
            f"{format} cannot quantize; it supports only linear layers"
        )
    return [name for name in linears if name not in names]


def write(checkpoint: Checkpoint, exported: Exported, directory: Path) -> None:
    """Write a checkpoint, with its quantized projections as exported, into an existing directory.

    Raises:
        OSError: the disk refuses.
    """
    model: Any = checkpoint.model
    own = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ReplacedLinear))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(own or ("\0",))}
    state |= {name: value.contiguous() for name, value in exported.tensors.items()}
    with silence_transformers():
        try:
            model.save_pretrained(directory, state_dict=state)
        except SafetensorError as error:
            raise OSError(0, str(error)) from error
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save_pretrained(directory)
    for place, content in checkpoint.companions.items():
        (directory / place).parent.mkdir(exist_ok=True)
        (directory / place).write_bytes(content)
    if exported.config:
        file = directory / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["quantization_config"] = dict(exported.config)
        file.write_text(atomic_io.to_json(config), encoding="utf-8")
