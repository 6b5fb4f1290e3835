"""`make test` lists stale records, without failing or rerunning anything."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import stale

from intaglio.evidence.engine.record import Record, all_committed
from tests.docs.conftest import CLAIM

ROOT = Path(__file__).resolve().parents[2]


def test_the_report(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stale.report({}) == "evidence: 0 committed records, none is stale"
    monkeypatch.setattr(stale, "is_registered", lambda slug: True)
    monkeypatch.setattr(stale, "load_claim", lambda slug: CLAIM)
    assert stale.report({"wanda": record}) == "evidence: 1 committed records, none is stale"
    monkeypatch.setattr(stale, "load_claim", lambda slug: replace(CLAIM, version=2, reason="another metric"))
    assert stale.report({"wanda": record}) == (
        "evidence: wanda is stale: its record is of version 1 of the claim, which is now version 2;"
        " `intaglio prove wanda --record` replaces it"
    )


@pytest.mark.slow
def test_make_test_runs_it() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ntest:")[2].partition("\n\n")[0]
    assert "docs/stale.py" in recipe
    done = subprocess.run([sys.executable, ROOT / "docs" / "stale.py"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == stale.report(all_committed())
