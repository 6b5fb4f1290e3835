"""Fixtures for the tests of the site's generator, which is in docs/ and joins the import path here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from intaglio.evidence.record import Record
from intaglio.evidence.run import prove
from tests.evidence.toy import Toy, toy

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Return a finished run of the toy claim, with the slug of Wanda, a pilot and secondary comparisons."""
    folder = tmp_path_factory.mktemp("prove")
    experiment = toy(Toy(units=3), most_runs=8, claim="The toy lowers the <b>loss</b> | by half a nat.")
    return Record.model_validate_json(json.dumps(prove("wanda", experiment=experiment, directory=folder)))
