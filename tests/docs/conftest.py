"""Fixtures for the tests of the site's generator, which is in docs/ and joins the import path here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from intaglio.evidence.engine.record import Record
from intaglio.evidence.engine.run import prove
from tests.evidence.engine.toy import toy_claim

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
CLAIM = toy_claim(says="The toy lowers the <b>loss</b> | by half a nat.")
"""The toy claim, with the slug of Wanda."""


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Return the record of a finished run of `CLAIM`."""
    return prove("wanda", claim=CLAIM, directory=tmp_path_factory.mktemp("prove"))
