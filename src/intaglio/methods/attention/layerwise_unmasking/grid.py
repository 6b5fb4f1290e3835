"""Groups of layers and the configurations of their masks.

Dimension letters: n layers, m groups, b = n/m layers of a group.
"""

from __future__ import annotations

import itertools

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import Anatomy

PAPER_GROUPS = 4
MOST_GROUPS = 16
"""Beyond, there are more configurations than anybody trains."""


def group_count(depth: int, groups: int | None = None) -> int:
    """Return m, the number of groups.

    Args:
        depth: n, layers of the model.
        groups: what was asked for; None for the divisor of n that is nearest to 4, the smaller of two.

    Raises:
        IntaglioError: m does not divide n.
    """
    divisors = [m for m in range(1, depth + 1) if depth % m == 0]
    if groups is None:
        return min(divisors, key=lambda m: (abs(m - PAPER_GROUPS), m))
    if groups not in divisors:
        accepted = ", ".join(map(str, divisors))
        raise IntaglioError(f"{groups} groups do not divide the {depth} layers of the model; accepted: {accepted}")
    return groups


def check_bits(bits: str, depth: int) -> None:
    """Refuse a configuration that a model has no groups for.

    Args:
        bits: the configuration.
        depth: layers of the model.

    Raises:
        IntaglioError: its length does not divide the layers.
    """
    group_count(depth, len(bits))


def check_decoder(parts: Anatomy) -> None:
    """Refuse a model that has no causal mask.

    Args:
        parts: of the model.

    Raises:
        IntaglioError: it is an encoder.
    """
    if not parts.causal:
        raise IntaglioError(
            f"unmasking an encoder changes nothing: {type(parts.model).__name__} sees both ways already; "
            "layerwise_unmasking needs a decoder"
        )


def configurations(groups: int) -> tuple[str, ...]:
    """Return all 2^m configurations in the paper's order: number i is i in binary, so that 1 is the last group alone.

    Args:
        groups: m.

    Raises:
        IntaglioError: m is not from 1 to 16.
    """
    if not 1 <= groups <= MOST_GROUPS:
        raise IntaglioError(
            f"{groups} groups have 2^{groups} configurations; from 1 to {MOST_GROUPS} groups are accepted"
        )
    return tuple("".join(bits) for bits in itertools.product("01", repeat=groups))


def unlocked_layers(bits: str, depth: int) -> list[int]:
    """Return the layers without a causal mask, in order, from 0.

    Args:
        bits: the configuration, leftmost bit for the layers nearest the input.
        depth: layers of the model, a multiple of the bits.

    Raises:
        IntaglioError: the bits do not divide the layers.
    """
    size = depth // group_count(depth, len(bits))
    return [layer for layer in range(depth) if bits[layer // size] == "1"]
