"""What the terminal says about a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from intaglio.evidence import summary
from intaglio.evidence.record import Record
from intaglio.evidence.run import prove
from tests.evidence.toy import Toy, toy


def record(directory: Path, runner: Toy, units: int | None = 10, **changes: Any) -> Record:
    document = prove("wanda", experiment=toy(runner, **changes), directory=directory, units=units)
    return Record.model_validate_json(json.dumps(document))


@pytest.mark.parametrize(
    ("runner", "why"),
    [
        (Toy(1.0), "holds (the interval lies above what matters)"),
        (Toy(0.0), "fails (the interval lies below what matters)"),
        (Toy(0.5), "inconclusive (the interval is narrow"),
        (Toy(0.5, noise=4.0), "underpowered (the interval is too wide"),
        (Toy(9.0, diverged=4), "fails (too many of the method's units diverged)"),
    ],
)
def test_the_sentence_gives_the_reason(runner: Toy, why: str, tmp_path: Path) -> None:
    found = record(tmp_path, runner)
    said = summary.sentence(found)
    assert why in said
    assert f"{found.effect:+.4f} nats" in said
    assert "to pass +0.5" in said
    assert said.endswith("10 pairs: 10 seeds.")


def test_it_says_when_time_was_too_short(tmp_path: Path) -> None:
    short = record(tmp_path / "a", Toy(noise=3.0), units=None, most_runs=6)
    assert short.pilot is not None
    assert f"by the pilot asked for {short.pilot.asked}, the tier's time allows 6" in summary.sentence(short)
    never = short.model_copy(update={"pilot": short.pilot.model_copy(update={"asked": None})})
    assert "no number of them suffices" in summary.sentence(never)


def test_the_tables_show_every_arm_its_cost_and_every_secondary(tmp_path: Path) -> None:
    found = record(tmp_path, Toy())
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    console.print(summary.arms(found))
    console.print(summary.secondaries(found))
    text = console.export_text()
    for name, arm in found.arms.items():
        assert f"{name}: {arm.what}" in summary.legend(found).split("\n")
        assert name in text
        assert f"{arm.mean:.4f}" in text
    for second in found.secondaries:
        assert f"{second.effect:+.4f}" in text
    assert "non-zero" in text
    assert found.parity in text
