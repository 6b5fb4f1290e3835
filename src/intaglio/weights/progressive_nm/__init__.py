"""Progressive N:M training (Bambhaniya et al., CPAL 2025): zeros that come by degrees while a model is trained.

- `method`: ProgressiveNM, a shaper of a `train` step.
- `sparsifier`: NMSparsifier, the same in a loop of your own, for any module.
- `schedule`: the recipes as functions of the step, and what a step's products need.
- `parametrization`: a weight under its mask, and which weights the gradient reaches.
- `masks`: which weights are kept.

Source: Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers, CPAL 2025, arXiv
2402.04744.
"""

from __future__ import annotations

from intaglio.weights.progressive_nm.masks import keep_mask
from intaglio.weights.progressive_nm.method import ProgressiveNM
from intaglio.weights.progressive_nm.schedule import Moment, Schedule
from intaglio.weights.progressive_nm.sparsifier import NMSparsifier

__all__ = ["Moment", "NMSparsifier", "ProgressiveNM", "Schedule", "keep_mask"]
