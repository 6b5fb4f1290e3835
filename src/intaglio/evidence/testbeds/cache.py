"""Cached artifacts of test beds and designs: directories in the user's cache, keyed by choices and a version.

Two processes that need the same artifact build it once; the second waits. A killed build resumes from its scratch
directory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intaglio import atomic_io
from intaglio.data import assets

FOLDER = "testbeds"
CHOICES = "choices.json"
"""The key of an artifact, written last: its presence means that the artifact is complete."""
PREPARED: list[float] = []
"""CPU seconds of each `preparation` in this process, which no arm of a claim is charged for."""


@contextmanager
def preparation() -> Iterator[None]:
    """Count a block as work that arms share: the training of a test bed, text that its model generates."""
    began = time.process_time()
    yield
    PREPARED.append(time.process_time() - began)


def digest(document: Any) -> str:
    """Return the SHA-256 of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, allow_nan=False).encode("ascii")).hexdigest()


def cached(name: str, choices: Mapping[str, Any], build: Callable[[Path, Path], None], version: int = 1) -> Path:
    """Return the directory of an artifact; build it unless it is cached.

    `choices` (JSON) decide the content; `version` is raised when the same choices give another. `build(target,
    scratch)` fills the empty directory `target`; `scratch` survives a killed build.
    """
    root = assets.cache_dir() / FOLDER
    key = {**choices, "version": version}
    path = root / f"{name}-{digest(key)[:16]}"
    if not (path / CHOICES).is_file():
        with atomic_io.locked(root / f"{path.name}.lock"):
            if not (path / CHOICES).is_file():
                scratch = root / f"{path.name}.scratch"
                with atomic_io.directory(path, overwrite=True) as target:
                    build(target, scratch)
                    atomic_io.write_json(target / CHOICES, key)
                shutil.rmtree(scratch, ignore_errors=True)
    return path
