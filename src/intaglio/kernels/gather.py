"""Linear layers that read only the columns of inputs with a score above a threshold.

    y_BO = linear(x_BI, weight_IO, threshold, scale_I, down_RI, up_RO, bias_O)

    m_bi = not (|x_bi| scale_i <= threshold_b)
    y_b = W (m_b x_b) + up^T (down ((1 - m_b) x_b)) + bias

Used for inference of R-Sparse (arXiv 2504.19449) and, without a low-rank part, of TEAL (arXiv 2408.14690). The weight
is stored column by column (`weight_IO`, contiguous), so that an input's column is contiguous and skipped inputs cost
only a comparison. NaN inputs are selected, so that they show in the result.

Dispatch: numba on a CPU, if installed (`pip install 'intaglio[kernels]'`), for float32 and bfloat16 weights and at most
`MOST_ROWS` rows; Triton on a CUDA device, for one row; else torch, which multiplies zeros. All add in float32 (torch in
the weight's dtype), each in its own order.

Dimension letters: B rows of activations (tokens), I inputs, O outputs, R rank of the low-rank part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.kernels._utils import describe_tensor, works

if TYPE_CHECKING:
    from intaglio.kernels.gather_numba import SharedInput

MOST_ROWS = 4
"""Most rows for which columns are gathered; more rows together select nearly every column."""
_DTYPES = (torch.float32, torch.bfloat16)


def linear(
    x: Tensor,
    weight_IO: Tensor,
    threshold: float | Tensor,
    scale_I: Tensor | None = None,
    down_RI: Tensor | None = None,
    up_RO: Tensor | None = None,
    bias_O: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer to the inputs that score above the threshold [..., O], in x's dtype; see the module."""
    if not x.ndim or not x.is_floating_point():
        raise IntaglioError(
            f"x: {describe_tensor(x)} cannot be multiplied: floating point of at least one dimension can."
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise IntaglioError("x: gathered columns pass no gradient on: call the model under torch.no_grad().")
    inputs, outputs = weight_IO.shape if weight_IO.ndim == 2 else (0, 0)
    if inputs != x.shape[-1] or not weight_IO.is_contiguous():
        raise IntaglioError(
            f"weight: {describe_tensor(weight_IO)} does not fit {x.shape[-1]} inputs: a contiguous matrix with as many "
            "rows does."
        )
    if (down_RI is None) != (up_RO is None):
        raise IntaglioError("down and up: one of the two is given: both or none are accepted.")
    rank = 0 if down_RI is None else len(down_RI)
    _check_fits("scale", scale_I, (inputs,), torch.float32, x)
    _check_fits("down", down_RI, (rank, inputs), weight_IO.dtype, x)
    _check_fits("up", up_RO, (rank, outputs), weight_IO.dtype, x)
    shape = x.shape
    x_BI = x if len(shape) == 2 else x.reshape(-1, inputs)
    if isinstance(threshold, Tensor):
        _check_fits("threshold", threshold, (len(x_BI),), torch.float32, x)
    y_BO = rows(x_BI, weight_IO, threshold, scale_I, down_RI, up_RO, bias_O)
    return y_BO if len(shape) == 2 else y_BO.view(*shape[:-1], outputs)


def rows(
    x_BI: Tensor,
    weight_IO: Tensor,
    threshold: float | Tensor,
    scale_I: Tensor | None,
    down_RI: Tensor | None,
    up_RO: Tensor | None,
    bias_O: Tensor | None,
    threads: int | None = None,
) -> Tensor:
    """Do the same for rows [B, O] without checks, for modules whose arguments are known to be valid.

    On a CPU `threads` sets the number of threads; without, it follows from the size.
    """
    fast = kernel(x_BI, weight_IO.dtype)
    if not fast:
        return _dense(x_BI, weight_IO, threshold, scale_I, down_RI, up_RO, bias_O)
    if isinstance(threshold, Tensor):
        threshold = threshold.contiguous()
    if fast == "numba":
        from intaglio.kernels import gather_numba

        # A product of SmolLM2's size takes some tens of microseconds, and each torch call beside it one.
        x_float = x_BI if x_BI.dtype == torch.float32 else x_BI.float()
        bias_O = bias_O if bias_O is None or bias_O.dtype == torch.float32 else bias_O.float()
        y_BO = gather_numba.linear(
            x_float.contiguous(), weight_IO, threshold, scale_I, down_RI, up_RO,
            None if bias_O is None else bias_O.contiguous(), threads,
        )  # fmt: skip
        return y_BO if x_BI.dtype == torch.float32 else y_BO.to(x_BI.dtype)
    from intaglio.kernels import gather_triton

    return gather_triton.linear(x_BI.contiguous(), weight_IO, threshold, scale_I, down_RI, up_RO, bias_O)


def shared_input(parts: Sequence[tuple[Tensor, float, Tensor | None, Tensor | None]]) -> SharedInput:
    """Return the numba kernel for projections of the same input; see `gather_numba.SharedInput`."""
    from intaglio.kernels import gather_numba

    float_parts = [(w, limit, scale, None if bias is None else bias.detach().float().contiguous())
                   for w, limit, scale, bias in parts]  # fmt: skip
    return gather_numba.SharedInput(float_parts)


def wanted(x: Tensor, threshold: float | Tensor, scale_I: Tensor | None) -> Tensor:
    """Return the mask m, bool [..., I]."""
    score = x.abs().float()
    if scale_I is not None:
        score = score * scale_I
    return ~(score <= threshold)


def _dense(
    x_BI: Tensor,
    weight_IO: Tensor,
    threshold: float | Tensor,
    scale_I: Tensor | None,
    down_RI: Tensor | None,
    up_RO: Tensor | None,
    bias_O: Tensor | None,
) -> Tensor:
    """Compute the product in torch."""
    limit = threshold[:, None] if isinstance(threshold, Tensor) else threshold
    keep_BI = wanted(x_BI, limit, scale_I)
    x = x_BI.to(weight_IO.dtype)
    y_BO = torch.where(keep_BI, x, 0) @ weight_IO
    if down_RI is not None and up_RO is not None:
        y_BO = y_BO + torch.where(keep_BI, 0, x) @ down_RI.T @ up_RO
    if bias_O is not None:
        y_BO = y_BO + bias_O.to(y_BO.dtype)
    return y_BO.to(x_BI.dtype)


def kernel(x_BI: Tensor, dtype: torch.dtype) -> str:
    """Return the implementation for these rows: "numba", "triton", or "" for torch."""
    if dtype not in _DTYPES or torch.compiler.is_compiling():  # compilers must not trace into calls by address
        return ""
    if x_BI.device.type == "cpu":
        return "numba" if 0 < len(x_BI) <= MOST_ROWS and _has("numba") else ""
    return "triton" if x_BI.device.type == "cuda" and len(x_BI) == 1 and _has("triton") else ""


def _has(package: str) -> bool:
    return works(package, "gather", "no columns are gathered, and zeros are multiplied")


def _check_fits(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> None:
    if tensor is None:
        return
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device or not tensor.is_contiguous():
        wanted = f"{'x'.join(map(str, shape))} of {str(dtype).removeprefix('torch.')}"
        raise IntaglioError(
            f"{name}: {describe_tensor(tensor)} does not fit: {wanted} on {x.device}, contiguous, would."
        )
