"""transformers' own `bitnet` format: ternary weights, four in a byte, and 8-bit activations scaled by 127 / max|x|.

    weight        [O / 4, I] uint8    rows o, o + O/4, o + 2 O/4, o + 3 O/4 in one byte, lowest bits first, code + 1
    weight_scale  [1]                 factor of the weights: y = product / (weight_scale * s_x)
    rms_norm.weight [I]               where the inner norm is RMSNorm

As read by transformers 5.24 (`integrations/bitnet.py`, `linear_class: bitlinear`); its other class, `autobitlinear`,
also scales the bias.

Dimension letters: O output features, I input features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.exporters.base import Exported, Projection, projections, quantization_of, stock_linears
from intaglio.methods.weights.bitnet.quantization import RMSNORM_EPS, Quantization

FORMAT = "bitnet"
EPS = 1e-5


def _check(how: Quantization) -> None:
    """Refuse a quantization that the format cannot represent."""
    low, high = how.weight_range
    wanted: dict[str, tuple[Any, bool, str]] = {
        "bits": (f"{how.bits:g}", (low, high) == (-1, 1), "1.58, ternary weights"),
        "per": (how.per, how.per == "tensor", "one scale a tensor"),
        "activation_bits": (how.activation_bits, how.activation_bits == 8, "activations of 8 bits"),
        "activation_scale": (how.activation_scale, how.activation_scale == "max", "a token's largest activation"),
        "activation_range": (how.activation_range, how.activation_range == 127, "127"),
        "norm": (how.norm, how.norm in (None, "none", "rmsnorm"), "rmsnorm or none"),
        "eps": (how.eps, how.eps == EPS, f"{EPS:g}"),
    }
    for name, (value, fits, accepted) in wanted.items():
        if not fits:
            raise IntaglioError(f"{name} is {value}; the format {FORMAT} of transformers supports only {accepted}")


def _packed(codes_OI: Tensor) -> Tensor:
    parts = (codes_OI + 1).to(torch.uint8).chunk(4)
    return parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6


def _tensors(p: Projection, how: Quantization, dtype: torch.dtype) -> dict[str, Tensor]:
    if float(p.scale_O1.min()) != float(p.scale_O1.max()):
        raise IntaglioError(
            f"{p.name} is fused of projections with a scale each; the format {FORMAT} has one scale a module"
        )
    if len(p.codes_OI) % 4:
        raise IntaglioError(f"{p.name} has {len(p.codes_OI)} outputs; the format {FORMAT} needs a multiple of 4")
    tensors = {f"{p.name}.weight": _packed(p.codes_OI), f"{p.name}.weight_scale": p.scale_O1[0].to(dtype)}
    if p.bias_O is not None:
        tensors[f"{p.name}.bias"] = p.bias_O
    if how.norm == "rmsnorm":
        norms = [part.norm_weight for part in p.parts]
        first = torch.ones(p.codes_OI.shape[1], dtype=dtype) if norms[0] is None else norms[0].detach()
        if any(norm is not None and not torch.equal(norm, first) for norm in norms):
            raise IntaglioError(f"{p.name} is fused of projections with a norm each; the format {FORMAT} has one")
        tensors[f"{p.name}.rms_norm.weight"] = first
    return tensors


def exported(checkpoint: Checkpoint) -> Exported:
    """Return a checkpoint quantized by `bitnet` in this format.

    Raises:
        IntaglioError: the format cannot represent its quantization.
    """
    how = quantization_of(checkpoint, FORMAT)
    _check(how)
    quantized = projections(checkpoint.model)
    unquantized = stock_linears(checkpoint, FORMAT, quantized)
    dtype = next(p for p in checkpoint.model.parameters() if p.is_floating_point()).dtype
    tensors: dict[str, Tensor] = {}
    for projection in quantized:
        tensors |= _tensors(projection, how, dtype)
    config = {
        "quant_method": FORMAT,
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": unquantized,
        "use_rms_norm": how.norm == "rmsnorm",
        "rms_norm_eps": RMSNORM_EPS,
    }
    return Exported(tensors, config)
