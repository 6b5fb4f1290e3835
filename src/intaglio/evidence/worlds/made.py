"""What a world makes once and finds again: a directory in the user's cache, named after a digest of what decides it.

Two processes that ask at the same time make it once: the second waits. A killed one leaves its scratch directory, and
the next goes on in it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from intaglio import atomic_io
from intaglio.data import assets
from intaglio.evidence import sources
from intaglio.evidence.experiment import digest

FOLDER = "worlds"
CHOICES = "choices.json"
"""Beside what was made: what decided it. Its presence means whole."""


def code_of(*modules: str) -> dict[str, str]:
    """What some modules of ours do, as hashes of their syntax trees.

    Only these modules count, not what they import: they are the ones that decide what is made.

    Args:
        modules: their names; a package stands for every file below it.
    """
    return {
        name: found
        for name, found in sources.hashes(modules).items()
        if any(f"{name}.".startswith(f"{module}.") for module in modules)
    }


def made(name: str, choices: Mapping[str, Any], make: Callable[[Path, Path], None]) -> Path:
    """The directory with what these choices give; made if it is not there.

    Args:
        name: of the world and what is made, such as `source_code`.
        choices: all that decides it; JSON.
        make: `make(target, scratch)` fills the empty directory `target`; what it leaves in `scratch` is there again
            when a killed process is followed by another.

    Raises:
        IntaglioError: the cache cannot be written.
    """
    root = assets.cache_dir() / FOLDER
    place = root / f"{name}-{digest(dict(choices))[:16]}"
    if not (place / CHOICES).is_file():
        with atomic_io.locked(root / f"{place.name}.lock"):
            if not (place / CHOICES).is_file():
                scratch = root / f"{place.name}.scratch"
                with atomic_io.directory(place, overwrite=True) as target:
                    make(target, scratch)
                    atomic_io.write_json(target / CHOICES, dict(choices))
                shutil.rmtree(scratch, ignore_errors=True)
    return place
