"""The bundled instruction pairs; files of a user's own are tested with the objective that reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from intaglio.data.python_source import source_folder
from intaglio.methods.objectives.meap import MEAP
from intaglio.trainer import instruction_data
from tests.trainer.helpers import checkpoint, run


def test_docstrings_are_pairs_of_what_is_asked_and_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "made_up"
    folder.mkdir()
    for name in ("one", "two"):
        body = "\n".join(f"    value = value + {n}" for n in range(4))
        (folder / f"{name}.py").write_text(
            f'def add_{name}(value):\n    """Return the value, {name} time more."""\n{body}\n    return value\n',
            encoding="utf-8",
        )
    monkeypatch.setattr(instruction_data, "source_files", lambda: source_folder(str(folder)))
    found = instruction_data.load_pairs("docstrings")
    assert found == instruction_data.load_pairs("docstrings")
    assert sorted(pair["prompt"] for pair in found) == [
        f"Write the Python function add_{name} of the module made_up.{name}. Return the value, {name} time more."
        for name in ("one", "two")
    ]
    assert all(pair["answer"].startswith("def add_") and '"""' not in pair["answer"] for pair in found)
    ckpt = checkpoint()
    short = [{**pair, "prompt": "go on"} for pair in found]
    assert run(ckpt, short, objective=MEAP(mode="finetuning", length=128, short=5), steps=2).steps == 2
