"""Input sparsity: the share of the projections' inputs that a token skips, counted while a model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from intaglio.modeling.replacement import InputCounter


@contextmanager
def count_inputs(model: nn.Module) -> Iterator[dict[str, InputCounter]]:
    """Count the inputs that input-selecting modules keep, by module name."""
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "tally")}
    tallies = {name: InputCounter() for name in modules}
    for name, module in modules.items():
        module.tally = tallies[name]
    try:
        yield tallies
    finally:
        for module in modules.values():
            module.tally = None


def input_sparsity(tallies: Mapping[str, InputCounter]) -> float | None:
    """Return the share of all inputs that were skipped; None where nothing was counted."""
    total = InputCounter(sum(tally.kept for tally in tallies.values()), sum(tally.seen for tally in tallies.values()))
    return total.left_out if total.seen else None
