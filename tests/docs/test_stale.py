"""`make test` lists stale records, without failing or rerunning anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import stale

from intaglio.evidence.record import Record, all_shipped

ROOT = Path(__file__).resolve().parents[2]


def test_the_report(record: Record) -> None:
    assert stale.report({}) == "evidence: 0 committed records, none is stale"
    assert stale.report({"wanda": record}) == "evidence: 1 committed records, none is stale"
    old = record.model_copy(update={"sources": {**record.sources, "intaglio.methods.weights.wanda": "0"}})
    assert stale.report({"dsnot": record, "wanda": old}) == (
        f"evidence: STALE wanda ({record.verdict} on {record.made}): intaglio.methods.weights.wanda changed since;"
        " `intaglio prove wanda --renew` clears it if the values are the same"
    )


def test_it_prints_and_never_fails(
    record: Record, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = record.model_copy(update={"sources": {}})
    monkeypatch.setattr(stale, "all_shipped", lambda: {"wanda": old})
    assert stale.main() == 0
    assert "STALE wanda" in capsys.readouterr().out


def test_make_test_runs_it() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ntest:")[2].partition("\n\n")[0]
    assert "docs/stale.py" in recipe
    done = subprocess.run([sys.executable, ROOT / "docs" / "stale.py"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == stale.report(all_shipped())
