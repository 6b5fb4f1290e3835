"""Recipes at work: checkpoint in, checkpoint out; killed at any moment, a run can be resumed.

- `run`: `carve` and `compare`.
- `planning`: what a carve would do and take, without weights.
- `begin`: what the steps begin with.
- `earlier`: what was done to it before, and whether the steps can follow that.
- `data`: what is calibrated and measured on.
- `steps`: whether a step fits, and one applied.
- `scratch`: where finished steps wait until the output appears.
- `told`: what a report says beside the numbers.
"""

from intaglio.recipe.data import Data, make_evaluator, prepare_data, read_texts
from intaglio.recipe.plan import plan
from intaglio.recipe.report_document import environment, non_default_fields
from intaglio.recipe.resume import check_output
from intaglio.recipe.run import carve, compare
from intaglio.recipe.steps import apply_step

__all__ = [
    "Data",
    "apply_step",
    "carve",
    "check_output",
    "compare",
    "given",
    "make_evaluator",
    "plan",
    "prepare_data",
    "provenance",
    "read_texts",
]
