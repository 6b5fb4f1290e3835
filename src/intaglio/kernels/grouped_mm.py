"""Grouped GEMM: products of rows with a matrix each, the rows of a matrix being contiguous.

Dimension letters: R rows, E matrices, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED = 16
"""Row alignment in bytes of the operands of torch's grouped product."""


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor, bias_EO: Tensor | None = None) -> Tensor:
    """Return y_r = W_e x_r + b_e [R, O], where e is the matrix of row r.

    Uses torch's grouped product where its operands allow it, else a product per matrix. Under autocast both are cast,
    as `F.linear` would.
    """
    kind = x_RI.device.type
    if torch.is_autocast_enabled(kind):
        wanted = torch.get_autocast_dtype(kind)
        x_RI, weight_EOI = x_RI.to(wanted), weight_EOI.to(wanted)
        bias_EO = None if bias_EO is None else bias_EO.to(wanted)
    if _grouped_fits(x_RI, weight_EOI):
        y_RO = F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=counts_E.cumsum(0).to(torch.int32))
    else:
        y_RO = one_by_one(x_RI, weight_EOI, counts_E)
    if bias_EO is None:
        return y_RO
    return y_RO + bias_EO.repeat_interleave(counts_E, dim=0, output_size=len(x_RI))


def one_by_one(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Return the same without bias, a product per matrix [R, O]: the reference, for any sizes and dtypes."""
    pieces = zip(x_RI.split(counts_E.tolist()), weight_EOI.unbind(0), strict=True)
    return torch.cat([F.linear(rows, weight_OI) for rows, weight_OI in pieces])


def _grouped_fits(x_RI: Tensor, weight_EOI: Tensor) -> bool:
    _, outputs, inputs = weight_EOI.shape
    if torch.compiler.is_compiling() and x_RI.dtype is not torch.bfloat16:  # its shape rule supports only bfloat16
        return False
    if x_RI.device.type == "cuda" and torch.cuda.get_device_capability(x_RI.device) < (8, 0):
        return False
    return (
        len(x_RI) > 0
        and x_RI.dtype == weight_EOI.dtype
        and x_RI.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(width * x_RI.element_size() % ALIGNED == 0 for width in (inputs, outputs))
    )


__all__ = ["grouped_linear", "one_by_one"]
