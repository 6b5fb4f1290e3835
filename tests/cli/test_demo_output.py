"""The output directory of demos."""

from __future__ import annotations

from pathlib import Path

import pytest

from intaglio.cli.demo_output import demo_directory
from intaglio.errors import IntaglioError


def write(output: Path, text: str) -> None:
    with demo_directory(output, "index") as temporary:
        (temporary / "index").mkdir()
        (temporary / "report.json").write_text(text)


def test_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    for text in ("first", "second"):
        write(tmp_path / "out", text)
    assert (tmp_path / "out" / "report.json").read_text() == "second"


def test_a_trained_model_with_a_report_is_kept(tmp_path: Path) -> None:
    for name in ("report.json", "report.html", "model.safetensors"):
        (tmp_path / name).write_text("kept")
    with pytest.raises(IntaglioError, match="exists and is not empty"):
        write(tmp_path, "lost")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(
        ("report.json", "report.html", "model.safetensors"), "kept"
    )
