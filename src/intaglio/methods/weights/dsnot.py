"""DSnoT (Zhang et al., ICLR 2024): refine a pruning mask without training, swapping one weight per row and cycle.

Dimension letters: R rows (outputs), I inputs, M group size.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from intaglio.checkpoint.calibration import InputStatistics
from intaglio.methods.base import Cost, Method, Workload
from intaglio.methods.weights.one_shot import OneShotPruner, PruneFn, masked, walk_cost
from intaglio.methods.weights.sparsegpt import DAMPENING, Factor, sparsegpt_score
from intaglio.methods.weights.sparsity_target import SparsityTarget, lowest_k_mask, prune_mask
from intaglio.methods.weights.wanda import wanda_score
from intaglio.modeling.anatomy import Linear

PAPER_CYCLES = 50
PAPER_THRESHOLD = 0.1
PAPER_WIDTH = 4096
PAPER_LENGTH = 2048
# Below this the variance of an input is rounding noise: the feature is effectively constant.
SMALLEST_VARIANCE = 1e-12


def scaled_cycles(inputs: int) -> int:
    """Return the paper's 50 cycles for rows of 4096 inputs, scaled to the row's width; at least 1."""
    return max(1, round(PAPER_CYCLES * inputs / PAPER_WIDTH))


def scaled_threshold(length: float) -> float:
    """Return the paper's 0.1, an error summed over segments of 2048 tokens, scaled to the segment length."""
    return PAPER_THRESHOLD * length / PAPER_LENGTH


@dataclass(frozen=True)
class Refined:
    """Result of `refine`: mask (True = pruned), expected output error (dense minus sparse) before and after, swaps."""

    mask_RI: Tensor
    error_before_R: Tensor
    error_R: Tensor
    swaps_R: Tensor


class _Candidates:
    """Sorted candidates of each row (smallest key first, ties by position), with a cursor.

    At most `most` candidates of a row are taken: only these are sorted.
    """

    def __init__(self, key_RI: Tensor, candidate_RI: Tensor, most: int) -> None:
        key_RI = key_RI.masked_fill(~candidate_RI, float("inf"))
        rows, inputs = key_RI.shape
        most = min(most, inputs)
        first_RK = lowest_k_mask(key_RI, most).nonzero()[:, 1].view(rows, most)
        self._order_RK = first_RK.gather(1, key_RI.gather(1, first_RK).sort(dim=1, stable=True).indices)
        self._count_R = candidate_RI.sum(1)
        self._used_R = torch.zeros_like(self._count_R)

    def take(self, rows_R: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next candidate of every row and whether there was one; rows where `rows_R` is True consume it."""
        available_R = self._used_R < self._count_R
        cursor_R = self._used_R.clamp(max=self._order_RK.shape[1] - 1)
        index_R = self._order_RK.gather(1, cursor_R[:, None]).squeeze(1)
        self._used_R += rows_R & available_R
        return index_R, available_R


def refine(
    weight_RI: Tensor,
    mask_RI: Tensor,
    sum_I: Tensor,
    variance_I: Tensor,
    *,
    prune_key_RI: Tensor,
    group: int | None,
    cycles: int,
    threshold: float,
    variance_power: float,
    same_sign: bool,
) -> Refined:
    """Swap pruned for kept weights, one pair per row and cycle, to drive the expected output error to zero.

    With C = W * mu the contribution of each weight to the expected output, err = sum of C over the pruned entries. Grow
    the pruned entry with the largest C / var^p if err > 0, with the smallest if err < 0. Unstructured: prune the kept
    entry with the smallest key among those whose C has the sign opposite to err. N:M: prune the kept entry with the
    smallest key in the grown entry's group, whatever its sign; entries whose group has no kept entry left to prune are
    skipped. A row stops for good when |err| <= threshold, when the swap would change the sign of its first error
    (`same_sign`), or when candidates of the needed sign run out.

    Every entry moves at most once, so the pattern holds after each cycle. The released code takes entries of the other
    sign, or entry 0 again, when candidates run out; here the row stops.
    """
    contribution_RI = weight_RI.float() * sum_I
    error_R = contribution_RI.masked_fill(~mask_RI, 0).sum(1)
    start_R = error_R.clone()
    grow_key_RI = contribution_RI / variance_I.clamp(min=SMALLEST_VARIANCE) ** variance_power
    positive_RI, negative_RI = contribution_RI > 0, contribution_RI < 0
    # N:M: each of at most `cycles` groups that are used up skips fewer than M candidates.
    most = cycles * (group or 1)
    grow_positive = _Candidates(-grow_key_RI, mask_RI & positive_RI, most)
    grow_negative = _Candidates(grow_key_RI, mask_RI & negative_RI, most)
    if group is None:
        prune_negative = _Candidates(prune_key_RI, ~mask_RI & negative_RI, cycles)
        prune_positive = _Candidates(prune_key_RI, ~mask_RI & positive_RI, cycles)
    else:
        free_RI = prune_key_RI.masked_fill(mask_RI, float("inf"))
        offset_M = torch.arange(group, device=weight_RI.device)

    def next_grown(rows_R: Tensor, up_R: Tensor) -> tuple[Tensor, Tensor]:
        top_R, has_top_R = grow_positive.take(rows_R & up_R)
        bottom_R, has_bottom_R = grow_negative.take(rows_R & ~up_R)
        return torch.where(up_R, top_R, bottom_R)[:, None], torch.where(up_R, has_top_R, has_bottom_R)

    mask_RI = mask_RI.clone()
    active_R = torch.ones_like(error_R, dtype=torch.bool)
    swaps_R = torch.zeros_like(error_R, dtype=torch.int64)
    for _ in range(cycles):
        active_R &= error_R.abs() > threshold
        if not active_R.any():
            break
        up_R = error_R > 0
        grow_R1, has_grow_R = next_grown(active_R, up_R)
        active_R &= has_grow_R
        if group is None:
            minus_R, has_minus_R = prune_negative.take(active_R & up_R)
            plus_R, has_plus_R = prune_positive.take(active_R & ~up_R)
            prune_R1 = torch.where(up_R, minus_R, plus_R)[:, None]
            active_R &= torch.where(up_R, has_minus_R, has_plus_R)
        else:
            while True:
                members_RM = grow_R1 - grow_R1 % group + offset_M
                key_RM, order_RM = free_RI.gather(1, members_RM).sort(dim=1, stable=True)
                used_up_R = active_R & ~torch.isfinite(key_RM[:, 0])
                if not used_up_R.any():
                    break
                next_R1, has_grow_R = next_grown(used_up_R, up_R)
                grow_R1 = torch.where(used_up_R[:, None], next_R1, grow_R1)
                active_R &= has_grow_R | ~used_up_R
            prune_R1 = members_RM.gather(1, order_RM[:, :1])
            free_RI.scatter_(1, prune_R1, float("inf"))
        change_R = (contribution_RI.gather(1, prune_R1) - contribution_RI.gather(1, grow_R1)).squeeze(1)
        if same_sign:
            active_R &= (error_R + change_R).sign() == start_R.sign()
        swapped_R1 = active_R[:, None]
        mask_RI.scatter_(1, prune_R1, mask_RI.gather(1, prune_R1) | swapped_R1)
        mask_RI.scatter_(1, grow_R1, mask_RI.gather(1, grow_R1) & ~swapped_R1)
        error_R = torch.where(active_R, error_R + change_R, error_R)
        swaps_R += active_R
    return Refined(mask_RI, start_R, error_R, swaps_R)


class DSnoT(OneShotPruner, SparsityTarget, Method, slug="dsnot"):
    """Refine the mask of magnitude, Wanda or SparseGPT without training and without changing a kept weight.

    The expected error of an output row is err = sum over its pruned entries of C = W * mu, mu the mean input summed
    over a segment. Each cycle grows one pruned weight and prunes one kept weight of every row so that err moves to
    zero; see `refine` for the rule. The base is taken a row at a time (also magnitude's and SparseGPT's; the latter by
    its score alone, on the original weights, without compensation).

    The paper's constants are tied to its scale: 50 cycles to rows of 4096 inputs, the threshold of 0.1 to segments of
    2048 tokens. By default both are scaled to the model and the data (50 * inputs/4096, at least 1; 0.1 * length/2048),
    and all layers are refined. `DSnoT.paper()` gives the paper's values, with attention refined only, as the released
    code does by default.

    Args:
        sparsity: share of zeros in each row, 0 <= sparsity < 1.
        pattern: `N:M`, keep N of every M consecutive inputs. Give exactly one of `sparsity` and `pattern`.
        ignore: layers that keep all their weights, by name or shell pattern. Default: none.
        base: method of the initial mask: `wanda` (default), `magnitude` or `sparsegpt`.
        refine: layers to refine: `all` (default), `attention` or `mlp`; the others keep the base's mask.
        max_cycles: most swaps per row; None (default) scales with the width; 0 gives the base's mask.
        threshold: rows with |err| up to this are left alone; None (default) scales with the segment length.
        same_sign: accept a swap only if err keeps its first sign. None (default): on. The released code has it off for
            unstructured masks and always on for N:M.
        variance_power: p in the growing criterion C / var^p. Default 1.
        dampening: dampening of the Hessian, for the base `sparsegpt`. Default 0.01.

    Raises:
        IntaglioError: (in `apply`) the pattern does not fit a width, no calibration data, NaN statistics.

    Warns:
        UserWarning: `max_cycles` is over 5 % of a row's inputs and the same-sign test is off, which ruins narrow
            layers.

    Source: Zhang et al., Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs, ICLR 2024, arXiv
    2310.08915, section 3; where they differ, the released code. Two departures from it: the variance is pooled exactly
    (the code drops the part between batches), and a row stops when candidates run out (see `refine`).
    """

    kinds = ("carving",)
    summary = "refines a pruning mask without training, swapping weights to cancel the expected output error"
    citation = "Zhang et al., Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs, ICLR 2024"
    url = "https://arxiv.org/abs/2310.08915"

    moments: ClassVar[bool] = True

    base: Literal["wanda", "magnitude", "sparsegpt"] = Field("wanda", description="method of the initial mask")
    refine: Literal["all", "attention", "mlp"] = Field("all", description="layers to refine")
    max_cycles: Annotated[int, Field(ge=0, description="most swaps per row")] | None = None
    threshold: (
        Annotated[float, Field(ge=0, description="rows with |expected error| up to this are left alone")] | None
    ) = None
    same_sign: bool | None = Field(None, description="accept a swap only if the error keeps its sign")
    variance_power: Annotated[float, Field(ge=0, description="power of the variance when growing")] = 1.0
    dampening: Annotated[float, Field(gt=0, le=1, description="dampening of the Hessian, for the base sparsegpt")] = (
        DAMPENING
    )

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the paper's values: 50 cycles, threshold 0.1, attention only, no same-sign test unless N:M."""
        values: dict[str, Any] = {"refine": "attention", "max_cycles": PAPER_CYCLES, "threshold": PAPER_THRESHOLD}
        return cls(**{**values, "same_sign": overrides.get("pattern") is not None, **overrides})

    def base_score(self, weight_RI: Tensor, statistics: InputStatistics, factor: Factor | None = None) -> Tensor:
        """Return the score of the base, float32 [R, I]: |W|, |W| sqrt(l2) or W^2/U_kk^2."""
        if self.base == "magnitude":
            return weight_RI.float().abs()
        if self.base == "wanda":
            return wanda_score(weight_RI, statistics.square_I)
        upper_II, dead_I = (factor or Factor(self.dampening)).of(statistics)
        return sparsegpt_score(weight_RI.masked_fill(dead_I, 0), upper_II)

    def mask(
        self, weight_RI: Tensor, statistics: InputStatistics, refined: bool = True, factor: Factor | None = None
    ) -> Refined:
        """Compute the mask of a matrix."""
        amount = self.amount
        score_RI = self.base_score(weight_RI, statistics, factor)
        mask_RI = prune_mask(score_RI, amount)
        group = amount[1] if isinstance(amount, tuple) else None
        cycles = scaled_cycles(weight_RI.shape[1]) if self.max_cycles is None else self.max_cycles
        threshold = scaled_threshold(statistics.mean_length) if self.threshold is None else self.threshold
        return refine(
            weight_RI,
            mask_RI,
            statistics.sum_I,
            statistics.variance_I,
            # Unstructured swaps prune in Wanda's order whatever the base; N:M in the base's own.
            prune_key_RI=wanda_score(weight_RI, statistics.square_I) if group is None else score_RI,
            group=group,
            cycles=cycles if refined else 0,
            threshold=threshold,
            variance_power=self.variance_power,
            same_sign=True if self.same_sign is None else self.same_sign,
        )

    @property
    def hessian(self) -> bool:
        """True for the base `sparsegpt`."""
        return self.base == "sparsegpt"

    def rule(self, linears: Sequence[tuple[str, int, int]]) -> tuple[PruneFn, dict[str, Any]]:
        """Return the rule that refines the base's mask, and a record of swaps and summed |err| before and after."""
        narrowest = min(columns for _, _, columns in linears)
        if self.same_sign is False and (self.max_cycles or 0) > max(1, 0.05 * narrowest):
            warnings.warn(
                f"dsnot: {self.max_cycles} cycles are over 5 % of the {narrowest} inputs of the narrowest layer; "
                "without the same-sign test this many swaps can ruin the mask",
                stacklevel=3,
            )
        chosen: dict[str, Any] = {"swaps": 0, "error_before": 0.0, "error_after": 0.0}
        factor = Factor(self.dampening)

        def rule(linear: Linear, statistics: InputStatistics) -> Tensor:
            result = self.mask(linear.read(), statistics, self.refine in ("all", linear.part), factor)
            chosen["swaps"] += int(result.swaps_R.sum())
            chosen["error_before"] += float(result.error_before_R.abs().sum())
            chosen["error_after"] += float(result.error_R.abs().sum())
            return masked(linear, result.mask_RI)

        return rule, chosen

    def estimate(self, workload: Workload) -> Cost:
        """Return the cost of two passes, the base's selection, and four selections of candidates."""
        walked = walk_cost(workload, hessian=self.hessian)
        return Cost(walked.flops, 5 * walked.sorted_elements, walked.extra_bytes)
