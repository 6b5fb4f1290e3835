"""Magnitude pruning (Han et al., NeurIPS 2015): the smallest weights of each layer go."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from intaglio.anatomy import anatomy
from intaglio.checkpoint import Checkpoint
from intaglio.method import Cost, Method, Progress, Workload, silent
from intaglio.weights.amount import Amount, prune_mask
from intaglio.weights.pruning import masked, refuse_integers, shapes


class Magnitude(Amount, Method, slug="magnitude"):
    """Prune by S = |W|, without data.

    Unstructured: one threshold a layer (`per="layer"`, as the pruning papers run it) or a share of every row
    (`per="row"`). N:M: the smallest of every group. Kept weights keep their bits; ties go by position, first inputs
    first.

    Args:
        sparsity: share of zeros in each layer, 0 <= sparsity < 1.
        pattern: `N:M`, keep N of every M consecutive inputs. Give one of the two.
        per: what weights are compared with, `layer` (default) or `row`.

    Raises:
        IntaglioError: (in `apply`) the pattern does not fit a width.

    Source: Han et al., Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015; as the
    baseline of Wanda (Sun et al., ICLR 2024), section 4.
    """

    storage: ClassVar[Literal["baked"]] = "baked"
    needs_calibration: ClassVar[bool] = False
    changes = frozenset({"weights"})
    requires = frozenset({"linear_weights"})

    per: Literal["layer", "row"] = Field("layer", description="compare weights within a layer or within a row")

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = silent,
    ) -> Checkpoint:
        """Prune `checkpoint` in place and return it.

        Args:
            checkpoint: what to prune.
            calibration: not used: magnitudes need no data.
            seed: not used.
            batch_size: not used.
            progress: called after each block.
        """
        self.check(shapes(checkpoint))
        parts = anatomy(checkpoint.model)
        for index in range(len(parts.blocks)):
            for linear in parts.linears(index):
                refuse_integers(linear)
                score_RI = linear.read().abs().float()
                linear.write(masked(linear, prune_mask(score_RI, self.amount, self.per)))
            progress(index + 1, len(parts.blocks), f"{self.slug}: block {index + 1}/{len(parts.blocks)}")
        checkpoint.note(self.slug, self.model_dump(), seed=seed)
        return checkpoint

    def estimate(self, workload: Workload) -> Cost:
        """One selection over all weights."""
        largest = max(rows * columns for rows, columns in workload.linears)
        return Cost(sorted_elements=float(sum(r * c for r, c in workload.linears)), extra_bytes=largest * 16)
