"""The share of the projections' inputs that a token leaves out, counted while a model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from intaglio.replaced import Tally


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, Tally]]:
    """Count what the modules that choose their inputs keep, by module name; nothing in a model without such.

    Args:
        model: runs inside of the context.
    """
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "tally")}
    tallies = {name: Tally() for name in modules}
    for name, module in modules.items():
        module.tally = tallies[name]
    try:
        yield tallies
    finally:
        for module in modules.values():
            module.tally = None


def left_out(tallies: Mapping[str, Tally]) -> float | None:
    """The share of all inputs that were left out; None where nothing was counted.

    Args:
        tallies: from `counted`.
    """
    whole = Tally(sum(one.kept for one in tallies.values()), sum(one.seen for one in tallies.values()))
    return whole.left_out if whole.seen else None


__all__ = ["counted", "left_out"]
