"""Sparse non-gated MoE: the product of the active experts only.

    u = SiLU(x up^T), seen as [T, E, H], times score [T, E, 1];   y = u down

Both matrices store the H rows of an expert contiguously. A few tokens (a decode step, the rows of a verify pass, a
chunk of a prompt) together read the union of their experts once, and no other expert:

    y_TD = apply(x_TD, up_FD, down_FD, score_TE)

Dispatch: with a gradient, or with more than `MOST_ROWS` tokens, the dense product with scores of zero (`masked`).
Otherwise numba on a CPU, if installed (`pip install 'intaglio[kernels]'`) and measured to be faster for these sizes
(`environment.tuning`), Triton on a CUDA device; else torch, which
copies the rows of the union (`gathered`) where they are few. All agree to the tolerance of their sums. The union of a
chunk is the kernel of Song et al., BlockFFN, COLM 2025 (arXiv 2507.08771).

Dimension letters: T tokens, D width, E experts, H rows of an expert, F = E H, U experts of the union.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.environment import tuning
from intaglio.errors import IntaglioError
from intaglio.kernels._utils import copies, works

MOST_ROWS = 16
"""Most tokens; more of them together activate most experts, and dense products reuse each row better."""
FEW = 1 / 3
"""Share of the experts from which copying their rows costs torch more than reading all of them."""
LEAST = 4
"""Fewest rows of a matrix that the kernels support."""
SMALL = 1 << 17
"""Elements of a matrix below which it stays in cache and the dense product is as fast as a call."""
DTYPES = (torch.float32, torch.bfloat16)
"""Weight dtypes of the kernels."""


def apply(x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, score_TE: Tensor) -> Tensor:
    """Return y [T, D], in x's dtype, by the fastest available implementation."""
    _check(x_TD, up_FD, down_FD, score_TE)
    if torch.is_grad_enabled() or not 0 < len(x_TD) <= MOST_ROWS or torch.compiler.is_compiling():
        return masked(x_TD, up_FD, down_FD, score_TE)
    fast = _kernel(x_TD, up_FD, down_FD)
    if fast == "numba":
        if not _wins(x_TD, up_FD, down_FD, score_TE):
            return masked(x_TD, up_FD, down_FD, score_TE)
        from intaglio.kernels import sparse_experts_numba

        return sparse_experts_numba.apply(x_TD, up_FD, down_FD, score_TE)
    if fast == "triton":
        from intaglio.kernels import sparse_experts_triton

        return sparse_experts_triton.apply(x_TD, up_FD, down_FD, score_TE)
    few = up_FD.numel() >= SMALL and int((score_TE != 0).any(0).sum()) <= FEW * score_TE.shape[1]
    return (gathered if few else masked)(x_TD, up_FD, down_FD, score_TE)


def _wins(x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, score_TE: Tensor) -> bool:
    """Return whether the CPU kernel is faster for these sizes, measured with the experts of the first such call."""
    tuner = tuning.tuner()
    if tuner is None:
        return True
    own = (len(x_TD), score_TE.shape[1], up_FD.shape, up_FD.dtype, torch.get_num_threads())
    if own not in tuner.chosen:
        from intaglio.kernels import sparse_experts_numba

        up, down, dtype = copies(up_FD.detach()), copies(down_FD.detach()), str(up_FD.dtype).removeprefix("torch.")
        calls = {
            name: partial(lambda product: product(x_TD, next(up), next(down), score_TE), product)
            for name, product in (("dense", masked), ("active", sparse_experts_numba.apply))
        }
        sizes = f"{up_FD.shape[1]}x{len(up_FD)} of {own[1]}"
        key = f"experts {sizes} {dtype} rows {len(x_TD)} threads {own[-1]}"
        tuner.chosen[own] = tuner.choose(key, calls, compiles=True)
        tuner.save()
    return tuner.chosen[own] == "active"


def masked(x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, score_TE: Tensor) -> Tensor:
    """Compute all experts, inactive ones times zero; differentiable. See `apply`."""
    u_TF = F.silu(F.linear(x_TD, up_FD))
    u_TEH = u_TF.unflatten(-1, (score_TE.shape[1], -1)) * score_TE.to(u_TF.dtype)[..., None]
    return u_TEH.flatten(-2) @ down_FD


def gathered(x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, score_TE: Tensor) -> Tensor:
    """Compute the union of the experts from copied rows; the reference of the kernels. See `apply`."""
    union_U = (score_TE != 0).any(0).nonzero()[:, 0]
    up_FD, down_FD = (
        weight.unflatten(0, (score_TE.shape[1], -1)).index_select(0, union_U).flatten(0, 1)
        for weight in (up_FD, down_FD)
    )
    score_TU = score_TE.index_select(1, union_U)
    return masked(x_TD, up_FD, down_FD, score_TU) if len(union_U) else torch.zeros_like(x_TD)


def _check(x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, score_TE: Tensor) -> None:
    if up_FD.shape != down_FD.shape or x_TD.shape[1:] != up_FD.shape[1:]:
        raise IntaglioError(
            f"experts: {_told(up_FD)} and {_told(down_FD)} do not fit tokens of {_told(x_TD)}; "
            "both are [F, D] for [T, D]"
        )
    if score_TE.shape[:1] != x_TD.shape[:1] or not score_TE.shape[1] or len(up_FD) % score_TE.shape[1]:
        raise IntaglioError(
            f"score: {_told(score_TE)} does not fit {len(x_TD)} tokens and {len(up_FD)} rows; [T, E] with equally many "
            "rows an expert does"
        )


def _told(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _kernel(x_TD: Tensor, up_FD: Tensor, down_FD: Tensor) -> str:
    """Return the implementation to use: "numba", "triton" or "torch"."""
    plain = up_FD.dtype in DTYPES and up_FD.dtype == down_FD.dtype == x_TD.dtype
    if not plain or len(up_FD) < LEAST or up_FD.numel() < SMALL or torch.is_autocast_enabled(x_TD.device.type):
        return "torch"
    if x_TD.device.type == "cpu" and _has("numba"):
        return "numba"
    return "triton" if x_TD.device.type == "cuda" and _has("triton") else "torch"


def _has(package: str) -> bool:
    return works(package, "sparse_experts", "experts are multiplied in plain torch")


__all__ = ["MOST_ROWS", "apply", "gathered", "masked"]
