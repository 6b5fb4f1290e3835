"""Groups of layers and the configurations of their masks.

Dimension letters: n layers, m groups, b = n/m layers of a group.
"""

from __future__ import annotations

import itertools

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import Anatomy

PAPER_GROUPS = 4
MOST_GROUPS = 16
"""More groups have too many configurations to train."""


def group_count(depth: int, groups: int | None = None) -> int:
    """Return m, the number of groups: as given, or the divisor of the depth nearest to 4."""
    divisors = [m for m in range(1, depth + 1) if depth % m == 0]
    if groups is None:
        return min(divisors, key=lambda m: (abs(m - PAPER_GROUPS), m))
    if groups not in divisors:
        accepted = ", ".join(map(str, divisors))
        raise IntaglioError(f"{groups} groups do not divide the {depth} layers of the model; accepted: {accepted}")
    return groups


def check_bits(bits: str, depth: int) -> None:
    """Refuse a configuration whose groups do not divide the layers."""
    group_count(depth, len(bits))


def check_decoder(parts: Anatomy) -> None:
    """Refuse an encoder, which has no causal mask."""
    if not parts.causal:
        raise IntaglioError(
            f"unmasking an encoder changes nothing: {type(parts.model).__name__} sees both ways already; "
            "layerwise_unmasking needs a decoder"
        )


def configurations(groups: int) -> tuple[str, ...]:
    """Return all 2^m configurations in the paper's order: number i is i in binary, so 1 is the last group alone."""
    if not 1 <= groups <= MOST_GROUPS:
        raise IntaglioError(
            f"{groups} groups have 2^{groups} configurations; from 1 to {MOST_GROUPS} groups are accepted"
        )
    return tuple("".join(bits) for bits in itertools.product("01", repeat=groups))


def unlocked_layers(bits: str, depth: int) -> list[int]:
    """Return the layers without a causal mask, in order, from 0."""
    size = depth // group_count(depth, len(bits))
    return [layer for layer in range(depth) if bits[layer // size] == "1"]
