"""Wanda (Sun et al., ICLR 2024): prune by weight magnitude times input norm, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from intaglio.checkpoint.calibration import InputStatistics
from intaglio.methods.base import Cost, Method, Workload
from intaglio.methods.weights.one_shot import OneShotPruner, PruneFn, masked, walk_cost
from intaglio.methods.weights.sparsity_target import SparsityTarget, prune_mask
from intaglio.modeling.anatomy import Linear


def wanda_score(weight_RI: Tensor, square_I: Tensor) -> Tensor:
    """Return S_rk = |W_rk| * sqrt(l2_k), float32 [R, I]."""
    return weight_RI.float().abs() * square_I.sqrt()


class Wanda(OneShotPruner, SparsityTarget, Method, slug="wanda"):
    """Prune by S_rk = |W_rk| ||x_k||_2, compared within each output row (unstructured) or each group (N:M).

    ||x_k||_2 is the norm of input feature k over the calibration tokens, computed from the outputs of the already
    pruned previous blocks. Weights are not updated; kept weights are bit-identical. In a mixture of experts the tokens
    of an expert's matrix are those routed to it, and routers keep all their weights.

    Args:
        sparsity: share of zeros in each row, 0 <= sparsity < 1; floor(inputs * sparsity) of a row are pruned.
        pattern: `N:M`, keep N of every M consecutive inputs. Give exactly one of `sparsity` and `pattern`.
        ignore: layers that keep all their weights, by name or shell pattern. Default: none.

    Raises:
        IntaglioError: (in `apply`) the pattern does not fit a width, no calibration data, NaN statistics.

    Source: Sun, Liu, Bair and Kolter, A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024,
    arXiv 2306.11695, section 3.
    """

    kinds = ("carving",)
    summary = "removes the weights with the smallest |weight| times input norm, row by row"
    citation = "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024"
    url = "https://arxiv.org/abs/2306.11695"

    def rule(self, linears: Sequence[tuple[str, int, int]]) -> tuple[PruneFn, dict[str, Any]]:
        """Return the rule that keeps the highest scores."""

        def rule(linear: Linear, statistics: InputStatistics) -> Tensor:
            return masked(linear, prune_mask(wanda_score(linear.read(), statistics.square_I), self.amount))

        return rule, {}

    def estimate(self, workload: Workload) -> Cost:
        """Return the cost of two passes over the blocks and one selection."""
        return walk_cost(workload)
