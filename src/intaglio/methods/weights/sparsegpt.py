"""SparseGPT (Frantar and Alistarh, ICML 2023): prune column by column, compensating with the rest of the row.

Dimension letters: R rows (outputs), I inputs, C columns of one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from intaglio.checkpoint.calibration import InputStatistics
from intaglio.errors import IntaglioError
from intaglio.methods.base import Cost, Method, Workload
from intaglio.methods.weights.one_shot import OneShotPruner, PruneFn, walk_cost
from intaglio.methods.weights.sparsity_target import SparsityTarget, lowest_of_groups, prune_mask
from intaglio.modeling.anatomy import Linear

DAMPENING = 0.01
BLOCK = 128
INNER = 16


def inverse_factor(hessian_II: Tensor, dampening: float = DAMPENING) -> tuple[Tensor, Tensor]:
    """Return U, the upper Cholesky factor of the inverse dampened Hessian: U^T U = (H + d mean(diag H) I)^-1.

    Inputs that are always zero (H_kk = 0) get H_kk = 1 first. The factorisation runs in float64 on the CPU, so that it
    agrees over thread counts; it is retried with ten times the dampening if the matrix is numerically not positive
    definite, as happens with few samples.

    Returns:
        U as float32 [I, I], and the dead inputs as bool [I].
    """
    if not torch.isfinite(hessian_II).all():
        raise IntaglioError("the calibration statistics are not finite: the inputs of a layer hold NaN or overflow")
    dead_I = hessian_II.diagonal() == 0
    while dampening <= 1.0:
        upper = _factor(hessian_II, dampening)
        if upper is not None:
            return upper.float().to(hessian_II.device), dead_I
        dampening *= 10
    raise IntaglioError("a layer's Hessian is not positive definite; give more calibration data or a larger dampening")


def _factor(hessian_II: Tensor, dampening: float) -> Tensor | None:
    """Return U in float64 on the CPU, or None if the dampened Hessian is numerically not positive definite.

    With P the reversal of order and P H P = L L^T, H^-1 = (P L^-1 P)^T (P L^-1 P), and P L^-1 P is upper triangular:
    one factorisation and one triangular inverse.
    """
    reversed_II = hessian_II.flip(0, 1).to("cpu", torch.float64)
    diagonal = reversed_II.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += dampening * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(reversed_II)
    if failed:
        return None
    # Reuses the memory of the reversed Hessian.
    identity = reversed_II.zero_().fill_diagonal_(1.0)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)


class Factor:
    """Cached `inverse_factor`, shared by the linears with the same input (q, k and v)."""

    def __init__(self, dampening: float) -> None:
        self._dampening = dampening
        self._last: tuple[InputStatistics, tuple[Tensor, Tensor]] | None = None

    def of(self, statistics: InputStatistics) -> tuple[Tensor, Tensor]:
        """Return U [I, I] and the dead inputs [I]."""
        if self._last is None or self._last[0] is not statistics:
            self._last = None  # free its memory first
            self._last = (statistics, inverse_factor(statistics.hessian_II, self._dampening))
        return self._last[1]


def sparsegpt_score(weight_RI: Tensor, upper_II: Tensor) -> Tensor:
    """Return S_rk = W_rk^2 / U_kk^2, float32 [R, I]."""
    return weight_RI.float().square() / upper_II.diagonal().square()


def sparsegpt(
    weight_RI: Tensor, upper_II: Tensor, dead_I: Tensor, amount: float | tuple[int, int], block: int = BLOCK
) -> Tensor:
    """Prune a matrix with compensation; return the updated weights, float32 [R, I].

    For each block of columns the mask takes the lowest W^2/U_kk^2 of the whole block (all rows together), or, for N:M,
    the lowest of each row's group, scored when the group's first column is reached. Then for each column i of the
    block, with w masked to q: e = (w - q)/U_ii, and the columns from i on lose e U[i, i:]; after the block the rest of
    the matrix loses E U[block, rest].
    """
    weight_RI = weight_RI.float().clone()
    weight_RI[:, dead_I] = 0
    inputs = weight_RI.shape[1]
    # Within a block the next few columns are updated one by one, the others by one product per `inner` columns, as the
    # block itself updates the rest of the matrix: the same sums, with less memory traffic.
    group_size = amount[1] if isinstance(amount, tuple) else 1
    inner = max(INNER // group_size, 1) * group_size
    for low in range(0, inputs, block):
        high = min(low + block, inputs)
        # Columns are processed one at a time: as rows of the transpose each is contiguous.
        w_CR = weight_RI[:, low:high].T.contiguous()
        upper_CC = upper_II[low:high, low:high]
        error_CR = torch.empty_like(w_CR)
        diagonal_C = upper_CC.diagonal().tolist()
        mask_CR = torch.empty_like(w_CR, dtype=torch.bool)
        if not isinstance(amount, tuple):
            mask_CR = prune_mask(sparsegpt_score(w_CR.T, upper_CC), amount, per="layer").T.contiguous()
        for start in range(0, high - low, inner):
            stop = min(start + inner, high - low)
            for i in range(start, stop):
                if isinstance(amount, tuple) and i % amount[1] == 0:
                    group = slice(i, i + amount[1])
                    score = (w_CR[group].T / upper_CC.diagonal()[group]).square()
                    mask_CR[group] = lowest_of_groups(score.contiguous(), *amount).T
                torch.mul(w_CR[i], mask_CR[i], out=error_CR[i]).div_(diagonal_C[i])
                w_CR[i + 1 : stop].addr_(upper_CC[i, i + 1 : stop], error_CR[i], alpha=-1)
            w_CR[stop:].addmm_(upper_CC[start:stop, stop:].T, error_CR[start:stop], alpha=-1)
        weight_RI[:, low:high] = w_CR.masked_fill_(mask_CR, 0).T
        if high < inputs:
            weight_RI[:, high:].addmm_(error_CR.T, upper_II[low:high, high:], alpha=-1)
    return weight_RI


class SparseGPT(OneShotPruner, SparsityTarget, Method, slug="sparsegpt"):
    """Prune by W_rk^2 / U_kk^2 and update the remaining weights to preserve the layer's outputs on calibration data.

    With H = (2/n) sum_t x_t x_t^T over the calibration tokens and U the upper Cholesky factor of (H + d I)^-1, columns
    are pruned from left to right in blocks; each pruned weight's error is spread over the columns to its right by U.
    Weights change, unlike under Wanda.

    The pruned share of a block of columns is exact (floor); the released code's `<= threshold` prunes one more, and
    more under ties. Weights of inputs that are always zero are set to zero whatever the amount, as there.

    Args:
        sparsity: share of zeros in each layer, 0 <= sparsity < 1.
        pattern: `N:M`, keep N of every M consecutive inputs. Give exactly one of `sparsity` and `pattern`.
        dampening: share of the mean diagonal added to the Hessian. Default 0.01.
        block: columns pruned at a time; for N:M a multiple of M. None (default): 128, or the next lower multiple of M.
        ignore: layers that keep all their weights, by name or shell pattern. Default: none.

    Raises:
        IntaglioError: (in `apply`) the pattern does not fit a width or the block, no calibration data, statistics that
            are not finite, a Hessian that cannot be inverted.

    Source: Frantar and Alistarh, SparseGPT, ICML 2023, arXiv 2301.00774, algorithm 1 and section 3.
    """

    kinds = ("carving",)
    summary = "removes weights column by column and updates the rest of the row to compensate"
    citation = (
        "Frantar and Alistarh, SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot, ICML 2023"
    )
    url = "https://arxiv.org/abs/2301.00774"

    dampening: Annotated[float, Field(gt=0, le=1, description="share of the mean diagonal added to the Hessian")] = (
        DAMPENING
    )
    block: Annotated[int, Field(ge=1, description="columns pruned at a time")] | None = None

    @property
    def hessian(self) -> bool:
        """Always True."""
        return True

    @property
    def columns(self) -> int:
        """Columns of a block."""
        if self.block is not None:
            return self.block
        group = self.amount[1] if isinstance(self.amount, tuple) else 1
        return max(BLOCK // group, 1) * group

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Refuse a width that the pattern does not divide, and a block that would cut the pattern's groups."""
        super().check(linears)
        amount = self.amount
        if isinstance(amount, tuple) and self.columns % amount[1]:
            raise IntaglioError(f"the block of {self.block} columns is not a multiple of the pattern's {amount[1]}")

    def rule(self, linears: Sequence[tuple[str, int, int]]) -> tuple[PruneFn, dict[str, Any]]:
        """Return the rule that prunes with compensation."""
        factor = Factor(self.dampening)

        def rule(linear: Linear, statistics: InputStatistics) -> Tensor:
            return sparsegpt(linear.read(), *factor.of(statistics), self.amount, self.columns)

        return rule, {}

    def estimate(self, workload: Workload) -> Cost:
        """Return the cost of two passes, the Hessians and their inversion, and the column updates."""
        walked = walk_cost(workload, hessian=True)
        solve = sum(float(rows) * columns**2 + 2.0 * columns**3 for rows, columns in workload.linears)
        return Cost(walked.flops + solve, walked.sorted_elements, walked.extra_bytes)
