"""The index of sharded safetensors files, in the format of transformers."""

from __future__ import annotations

import json
from pathlib import Path

from intaglio.errors import IntaglioError, first_line

INDEX = ".safetensors.index.json"
"""Suffix of an index file."""


def read_index(index: Path) -> dict[str, str]:
    """Return the shard of each tensor; refuse an index with missing shards."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise IntaglioError(
            f"{index} is not a valid index of shards: no weight_map can be read from it ({first_line(error)})"
        ) from error
    # Names in its own folder only: a path out of it is not followed.
    present = {file.name for file in index.parent.glob("*.safetensors")}
    missing = sorted(set(shards.values()) - present)
    if missing:
        raise IntaglioError(f"{index.parent} is incomplete: {missing[0]} is missing")
    return shards
