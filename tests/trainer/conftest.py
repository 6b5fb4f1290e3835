"""Trainer collects garbage at each start; with all that is loaded put aside, that takes no time."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import intaglio.trainer


@pytest.fixture(autouse=True, scope="session")
def _garbage_put_aside() -> Iterator[None]:
    assert intaglio.trainer.train is not None  # loaded by now
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
