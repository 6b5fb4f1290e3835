"""Linear layers that read the columns of some inputs alone: those whose score is above a threshold (inference of
R-Sparse, arXiv 2504.19449; without a low-rank part, of TEAL, arXiv 2408.14690).

    y_BO = linear(x_BI, weight_IO, threshold, scale_I, down_RI, up_RO, bias_O)

    m_bi = not (|x_bi| scale_i <= threshold_b)
    y_b = W (m_b x_b) + up^T (down ((1 - m_b) x_b)) + bias

The weight lies column by column (`weight_IO`, contiguous), so that what belongs to one input is one run of memory, and
inputs that are not wanted cost nothing but a look at them. An input that is not a number is wanted, so that it is seen
in the result.

Which code runs: on a CPU numba's, if numba is installed (`pip install 'intaglio[kernels]'`), for float32 and bfloat16
weights and at most `MOST_ROWS` rows; on a CUDA device Triton's, for one row; else torch's, which multiplies zeros. All
add in float32 (torch in the weight's dtype), each in an order of its own.

Dimension letters: B rows of activations (tokens), I inputs, O outputs, R rank of the low-rank part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.kernels._utils import describe_tensor, works

MOST_ROWS = 4
"""Rows for which columns are gathered; more of them want nearly every column between them."""
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
    """Apply a linear layer from the columns of the inputs that score above the threshold; see the module.

    Args:
        x: [..., I], floating point.
        weight_IO: [I, O], contiguous, on the same device, as are all others.
        threshold: one number, or one a row, float32 [B]. Below 0: every input; infinity: none.
        scale_I: float32 [I], of the scores; None: ones.
        down_RI: [R, I] in the weight's dtype, contiguous: where the other inputs go; None: nowhere.
        up_RO: [R, O], likewise, given with `down_RI`.
        bias_O: [O], or None.

    Returns:
        [..., O], in x's dtype.

    Raises:
        IntaglioError: shapes, dtypes or devices that do not fit; x asks for a gradient, which there is none of.
    """
    if not x.ndim or not x.is_floating_point():
        raise IntaglioError(
            f"x: {describe_tensor(x)} cannot be multiplied: floating point of at least one dimension can."
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise IntaglioError("x: gathered columns pass no gradient on: call the model under torch.no_grad().")
    inputs, outputs = weight_IO.shape if weight_IO.ndim == 2 else (0, 0)
    if inputs != x.shape[-1] or not weight_IO.is_contiguous():
        raise IntaglioError(
            f"weight: {describe_tensor(weight_IO)} does not fit {x.shape[-1]} inputs: a contiguous matrix with as many rows does."
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
) -> Tensor:
    """The same for rows, without a look at what is given: for modules that know that it fits.

    Args:
        x_BI: [B, I].
        weight_IO, threshold, scale_I, down_RI, up_RO, bias_O: see `linear`.

    Returns:
        [B, O], in x's dtype.
    """
    fast = kernel(x_BI, weight_IO.dtype)
    if not fast:
        return _dense(x_BI, weight_IO, threshold, scale_I, down_RI, up_RO, bias_O)
    if isinstance(threshold, Tensor):
        threshold = threshold.contiguous()
    if fast == "numba":
        from intaglio.kernels import gather_numba

        # A product of SmolLM2's size takes some tens of microseconds, and what torch is asked for beside it one each.
        x_float = x_BI if x_BI.dtype == torch.float32 else x_BI.float()
        bias_O = bias_O if bias_O is None or bias_O.dtype == torch.float32 else bias_O.float()
        y_BO = gather_numba.linear(
            x_float.contiguous(), weight_IO, threshold, scale_I, down_RI, up_RO,
            None if bias_O is None else bias_O.contiguous(),
        )  # fmt: skip
        return y_BO if x_BI.dtype == torch.float32 else y_BO.to(x_BI.dtype)
    from intaglio.kernels import gather_triton

    return gather_triton.linear(x_BI.contiguous(), weight_IO, threshold, scale_I, down_RI, up_RO, bias_O)


def wanted(x: Tensor, threshold: float | Tensor, scale_I: Tensor | None) -> Tensor:
    """The mask m, bool [..., I].

    Args:
        x: [..., I].
        threshold: one number, or a tensor that broadcasts to [..., 1].
        scale_I: float32 [I], or None.
    """
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
    """The product in torch."""
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
    """What gathers columns for these rows: "numba", "triton", or nothing (an empty text).

    Args:
        x_BI: [B, I].
        dtype: of the weight.
    """
    if dtype not in _DTYPES or torch.compiler.is_compiling():  # a compiler must not look into calls by address
        return ""
    if x_BI.device.type == "cpu":
        return "numba" if 0 < len(x_BI) <= MOST_ROWS and _has("numba") else ""
    return "triton" if x_BI.device.type == "cuda" and len(x_BI) == 1 and _has("triton") else ""


def _has(package: str) -> bool:
    return works(package, "gather", "no columns are gathered, and zeros are multiplied")


def _check_fits(name: str, given: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> None:
    if given is None:
        return
    if given.shape != shape or given.dtype != dtype or given.device != x.device or not given.is_contiguous():
        wanted = f"{'x'.join(map(str, shape))} of {str(dtype).removeprefix('torch.')}"
        raise IntaglioError(
            f"{name}: {describe_tensor(given)} does not fit: {wanted} on {x.device}, contiguous, would."
        )
