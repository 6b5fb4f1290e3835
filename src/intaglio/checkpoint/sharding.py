"""The index of a set of safetensors files that hold one thing together, as transformers writes it too."""

from __future__ import annotations

import json
from pathlib import Path

from intaglio.errors import IntaglioError, first_line

INDEX = ".safetensors.index.json"
"""What the name of such an index ends in."""


def read_index(index: Path) -> dict[str, str]:
    """The shard that each tensor is in; every shard is there.

    Args:
        index: the file, beside its shards.

    Raises:
        IntaglioError: it is no index, or a shard is missing.
    """
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name): str(shard) for name, shard in found.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise IntaglioError(
            f"{index} is not a valid index of shards: no weight_map can be read from it ({first_line(error)})"
        ) from error
    # By the names in its own folder: a path that leads out of it is not followed.
    there = {file.name for file in index.parent.glob("*.safetensors")}
    missing = sorted(set(shards.values()) - there)
    if missing:
        raise IntaglioError(f"{index.parent} is incomplete: {missing[0]} is missing")
    return shards
