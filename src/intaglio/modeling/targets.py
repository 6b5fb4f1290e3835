"""Projections of a model chosen by name, and modules put in their places, fused ones taken apart.

Dimension letters: O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import Linear
from intaglio.modeling.replacement import FusedLinears, ReplacedLinear, module_names


def check_patterns(names: Sequence[str], fields: Mapping[str, Sequence[str]]) -> None:
    """Refuse names and shell patterns that mean no layer.

    Args:
        names: of layers, at least one.
        fields: `{field: names or shell patterns}`.

    Raises:
        IntaglioError: says which of which field.
    """
    for field, patterns in fields.items():
        for pattern in patterns:
            if not any(matches(name, pattern) for name in names):
                raise IntaglioError(
                    f"{field}: {pattern!r} names no layer of this model; its first is {names[0]}, and * and ? stand"
                    " for any characters"
                )


def select_layers(names: Sequence[str], targets: Sequence[str] | None, ignore: Sequence[str]) -> list[int]:
    """The places of the names that `targets` means and `ignore` does not, in order.

    Args:
        names: of layers.
        targets: names or shell patterns; None: every layer.
        ignore: likewise, left out.
    """
    return [
        place
        for place, name in enumerate(names)
        if (targets is None or any(matches(name, pattern) for pattern in targets))
        and not any(matches(name, pattern) for pattern in ignore)
    ]


def matches(name: str, pattern: str) -> bool:
    """Whether a name or a shell pattern means a layer.

    Args:
        name: of the layer.
        pattern: its name, or a shell pattern.
    """
    # A part of a fused projection has brackets in its name, which are a pattern's too.
    return name == pattern or fnmatchcase(name, pattern)


Make = Callable[[str, Linear], ReplacedLinear]
"""Gives the module for a projection, by its full name."""


def plan_replacements(
    model: nn.Module, linears: Sequence[tuple[str, Linear]], every: Sequence[tuple[str, Linear]], make: Make
) -> dict[str, nn.Module]:
    """The modules that replace those of some projections, by where they stand; parts of a fused one are joined.

    Args:
        model: has the modules.
        linears: projections that are replaced, by name.
        every: all projections.
        make: gives the module for one of them.

    Raises:
        IntaglioError: some parts of a fused module are replaced and others are not.
    """
    places = module_names(model)
    found: dict[str, nn.Module] = {}
    for name, linear in linears:
        place = places[id(linear.module)]
        if linear.rows is None:
            found[place] = make(name, linear)
        elif place not in found:
            parts = fused_parts(linear, linears)
            left = [other for other, _ in fused_parts(linear, every) if other not in dict(parts)]
            if left:
                raise IntaglioError(f"{name} and {left[0]} are one module of this model; name both or neither")
            rows = [part.rows for _, part in parts if part.rows is not None]
            found[place] = FusedLinears([make(full, part) for full, part in parts], rows)
    return found


def fused_parts(linear: Linear, among: Sequence[tuple[str, Linear]]) -> list[tuple[str, Linear]]:
    """The projections that are one module with another.

    Args:
        linear: the other.
        among: all of them, by name.
    """
    return [(name, part) for name, part in among if part.module is linear.module]


__all__ = ["Make", "check_patterns", "fused_parts", "matches", "plan_replacements", "select_layers"]
