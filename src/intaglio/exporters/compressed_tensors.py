"""compressed-tensors' `pack-quantized`: integers of up to 8 bits packed into int32, dequantized on load.

    weight_packed [O, ceil(I b / 32)] int32    element i of a row at bit i b, as code + 2^(b-1)
    weight_scale  [1] or [O, 1]                a weight is code * scale
    weight_shape  [2]                          (O, I)

As read by the package (0.20: `compressors/pack_quantized`, `quantization/lifecycle`). It scales activations by
127.5 / max|x| where this library uses 128 or 127, so checkpoints with quantized activations are refused.

Dimension letters: O output features, I input features, P 32-bit words of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.exporters.base import Exported, projections, quantization_of, stock_linears

FORMAT = "compressed-tensors"


def bits_of(low: int, high: int) -> int:
    """Return the bits of a signed integer that holds the codes from `low` to `high`."""
    return max((-low - 1).bit_length(), high.bit_length()) + 1


def packed(codes_OI: Tensor, bits: int) -> Tensor:
    """Pack signed codes of some bits into words, int32 [O, P]; a code may continue in the next word."""
    codes = codes_OI.numpy().astype(np.int16) + (1 << (bits - 1))
    planes = (codes[..., None] >> np.arange(bits, dtype=np.int16)) & 1
    flat = planes.reshape(len(codes), -1).astype(np.uint8)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    words = np.packbits(flat, axis=1, bitorder="little").view("<u4").astype(np.uint32)
    return torch.from_numpy(words.view(np.int32).copy())


def exported(checkpoint: Checkpoint) -> Exported:
    """Return a checkpoint quantized by `bitnet` in this format.

    Raises:
        IntaglioError: quantized activations, an inner norm, or projections that are not linear layers.
    """
    how = quantization_of(checkpoint, FORMAT)
    if how.activation_bits is not None:
        raise IntaglioError(
            f"activations of {how.activation_bits} bits are scaled by {how.activation_top} / max|x| here and by "
            f"{2**how.activation_bits - 1} / 2 / max|x| in {FORMAT}, which gives other results; quantize with "
            "activation_bits: null to export to this format"
        )
    if how.norm not in (None, "none"):
        raise IntaglioError(f"norm is {how.norm!r}; {FORMAT} has no norm before a projection")
    quantized = projections(checkpoint.model)
    unquantized = stock_linears(checkpoint, FORMAT, quantized)
    bits = bits_of(*how.weight_range)
    rows = any(float(p.scale_O1.min()) != float(p.scale_O1.max()) for p in quantized)
    dtype = next(p for p in checkpoint.model.parameters() if p.is_floating_point()).dtype
    tensors: dict[str, Tensor] = {}
    for p in quantized:
        step = (1 / p.scale_O1).to(dtype)
        tensors |= {
            f"{p.name}.weight_packed": packed(p.codes_OI, bits),
            f"{p.name}.weight_scale": step if rows else step[0],
            f"{p.name}.weight_shape": torch.tensor(p.codes_OI.shape),
        }
        if p.bias_O is not None:
            tensors[f"{p.name}.bias"] = p.bias_O
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    weights["strategy"] = "channel" if rows else "tensor"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    config = {
        "quant_method": FORMAT,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": unquantized,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return Exported(tensors, config)
