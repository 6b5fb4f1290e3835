"""The site's generator lies beside the guides, not in the package; here it joins the import path."""

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
    """A finished run of the toy claim, under the slug of Wanda, with a pilot and secondaries."""
    folder = tmp_path_factory.mktemp("prove")
    experiment = toy(Toy(units=3), most_runs=8, claim="The toy lowers the <b>loss</b> | by half a nat.")
    return Record.model_validate_json(json.dumps(prove("wanda", experiment=experiment, directory=folder)))
