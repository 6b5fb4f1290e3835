"""The infilling half of the training demo, in miniature."""

from __future__ import annotations

from pathlib import Path

import pytest

import intaglio
from intaglio.cli import demo_infill
from intaglio.data.infill_format import infill_format


def test_it_trains_a_model_that_fills_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_infill, "STEPS", 2)
    monkeypatch.setattr(demo_infill, "PACKAGE", "json")
    document, section = demo_infill.infilling(tmp_path / "out")
    assert section["curve"]["step"][-1] == 2
    (table,) = section["tables"]
    assert len(table["headings"]) == len(table["rows"][0]) == 4
    assert tuple(heading.lower() for heading in table["headings"]) == demo_infill.COLUMNS
    assert "lines filled exactly" in document["steps"][-1]["samples"]["scores"]
    assert infill_format(intaglio.load(tmp_path / "out").tokenizer, "out").holes == 8
