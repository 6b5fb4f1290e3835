"""Magnitude pruning (Han et al., NeurIPS 2015): prune the smallest weights of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from intaglio.checkpoint.calibration import InputStatistics
from intaglio.methods.base import Cost, Method, Workload
from intaglio.methods.weights.one_shot import OneShotPruner, PruneFn, masked
from intaglio.methods.weights.sparsity_target import SparsityTarget, prune_mask
from intaglio.modeling.anatomy import Linear


class Magnitude(OneShotPruner, SparsityTarget, Method, slug="magnitude"):
    """Prune by S = |W|, without data.

    Unstructured: one threshold per layer (`per="layer"`, as the pruning papers run it) or a share of every row
    (`per="row"`). N:M: the smallest of every group. Kept weights are bit-identical; ties are broken by position, first
    inputs first.

    Args:
        sparsity: share of zeros in each layer, 0 <= sparsity < 1.
        pattern: `N:M`, keep N of every M consecutive inputs. Give exactly one of `sparsity` and `pattern`.
        ignore: layers that keep all their weights, by name or shell pattern. Default: none.
        per: scope of the comparison, `layer` (default) or `row`.

    Raises:
        IntaglioError: (in `apply`) the pattern does not fit a width.

    Source: Han et al., Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015; as the
    baseline of Wanda (Sun et al., ICLR 2024), section 4.
    """

    kinds = ("carving",)
    summary = "removes the smallest weights of each layer; needs no data"
    citation = "Han et al., Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015"
    url = "https://arxiv.org/abs/1506.02626"

    needs_calibration: ClassVar[bool] = False

    per: Literal["layer", "row"] = Field("layer", description="compare weights within a layer or within a row")

    def rule(self, linears: Sequence[tuple[str, int, int]]) -> tuple[PruneFn, dict[str, Any]]:
        """Return the rule that keeps the largest weights."""

        def rule(linear: Linear, _: InputStatistics) -> Tensor:
            return masked(linear, prune_mask(linear.read().abs().float(), self.amount, self.per))

        return rule, {}

    def estimate(self, workload: Workload) -> Cost:
        """Return the cost of one selection over all weights."""
        largest = max(rows * columns for rows, columns in workload.linears)
        return Cost(sorted_elements=float(sum(r * c for r, c in workload.linears)), extra_bytes=largest * 16)
