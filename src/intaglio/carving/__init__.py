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

from intaglio.carving.data import Data, make_yardstick, prepare_data, read_texts
from intaglio.carving.planning import plan
from intaglio.carving.run import carve, compare
from intaglio.carving.scratch import check_output
from intaglio.carving.steps import apply_step
from intaglio.carving.told import given, provenance

__all__ = [
    "Data",
    "apply_step",
    "carve",
    "check_output",
    "compare",
    "given",
    "make_yardstick",
    "plan",
    "prepare_data",
    "provenance",
    "read_texts",
]
