"""The share of the projections' inputs that a token leaves out, counted while a model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from intaglio.modeling.replacement import InputCounter


@contextmanager
def count_inputs(model: nn.Module) -> Iterator[dict[str, InputCounter]]:
    """Count what the modules that choose their inputs keep, by module name; nothing in a model without such.

    Args:
        model: runs inside of the context.
    """
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
    """The share of all inputs that were left out; None where nothing was counted.

    Args:
        tallies: from `counted`.
    """
    whole = InputCounter(sum(one.kept for one in tallies.values()), sum(one.seen for one in tallies.values()))
    return whole.left_out if whole.seen else None


__all__ = ["count_inputs", "input_sparsity"]
