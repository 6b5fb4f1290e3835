"""What a run that decided nothing says about the next one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from intaglio.evidence import statistics as stats
from intaglio.evidence.outlook import outlook
from intaglio.evidence.record import Record
from intaglio.evidence.run import paired, prove
from tests.evidence.toy import Toy, toy


def recorded(tmp_path: Path, runner: Toy, units: int) -> Record:
    return Record.model_validate_json(
        json.dumps(prove("wanda", experiment=toy(runner, most_runs=500), directory=tmp_path, units=units))
    )


@pytest.mark.parametrize("units", [1, 4, 0])
def test_an_open_verdict_says_how_large_a_run_would_be_narrow_enough(units: int, tmp_path: Path) -> None:
    found = recorded(tmp_path, Toy(0.5, noise=3.0, units=units), 8)
    assert found.verdict == "underpowered"
    said = outlook(found)
    needed = stats.larger(found.design, paired(found).rows, found.delta)
    assert needed is not None
    assert f"about {needed.runs:,} seeds" in said
    assert "0.3 was aimed at" in said
    assert ("comes from which seeds" in said) == (units == 4)
    larger = recorded(tmp_path, Toy(0.5, noise=3.0, units=units), int(re.findall(r"about ([\d,]+) seeds", said)[0]))
    assert larger.interval[1] - larger.interval[0] < (found.interval[1] - found.interval[0])


def test_a_decision_needs_none(tmp_path: Path) -> None:
    found = recorded(tmp_path, Toy(1.0), 8)
    assert found.verdict == "holds"
    assert outlook(found) == ""
