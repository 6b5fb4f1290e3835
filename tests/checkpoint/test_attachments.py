"""Attachments in shards: what is written is what is read, and nothing is put together that does not belong together."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from intaglio.checkpoint import load
from intaglio.checkpoint.attachments import Attachment, read_attachments
from intaglio.errors import IntaglioError
from tests.families import tiny_checkpoint_dir


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint_dir("llama", tmp_path / "model", layers=1)


def many(tensors: int = 5) -> Attachment:
    content = {f"t{n}": torch.full((10,), n, dtype=torch.bfloat16) for n in range(tensors)}
    return Attachment("chimera", content, {"heads": 4}, 0, {"model": "x"}, "")


def save(path: Path, attachment: Attachment, model: Path, most: int | None = 40) -> Path:
    """A checkpoint directory with an attachment in shards."""
    shutil.copytree(model, path)
    (path / "attachments").mkdir()
    attachment.write(path / "attachments", most)
    return path / "attachments"


def test_shards_read_back_the_same(model: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", many(), model)
    names = [f"chimera-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "chimera.safetensors.index.json"]
    index = json.loads((folder / "chimera.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 100}, "weight_map": {f"t{n}": names[n // 2] for n in range(5)}}
    with safe_open(folder / names[0], framework="pt") as file:
        assert list(file.keys()) == ["t0", "t1"]
    other = replace(many(2), slug="aded")
    other.write(folder)
    found = load(tmp_path / "a").attachments
    assert list(found) == ["aded", "chimera"]
    for one, wanted in ((found["chimera"], many()), (found["aded"], other)):
        assert replace(one, tensors={}) == replace(wanted, tensors={})
        assert one.tensors.keys() == wanted.tensors.keys()
        assert all(torch.equal(one.tensors[name], value) for name, value in wanted.tensors.items())
    load(tmp_path / "a").save(tmp_path / "b")
    again = read_attachments(tmp_path / "b")["chimera"]
    assert all(torch.equal(again.tensors[name], value) for name, value in many().tensors.items())


def test_one_shard_is_one_file(tmp_path: Path) -> None:
    many().write(tmp_path, 100)
    assert [path.name for path in tmp_path.iterdir()] == ["chimera.safetensors"]


def test_damaged_shards_are_one_sentence(model: Path, tmp_path: Path) -> None:
    first, last = "chimera-00001-of-00003.safetensors", "chimera-00003-of-00003.safetensors"
    index = "chimera.safetensors.index.json"

    def cut(folder: Path) -> None:
        (folder / last).write_bytes((folder / last).read_bytes()[:-8])

    def mixed(folder: Path) -> None:
        replace(many(), parameters={"heads": 5}).write(folder, 40)
        replace(many(), parameters={"heads": 5}).write(folder, 40)
        save(tmp_path / "other", many(), model)
        shutil.copy(tmp_path / "other" / "attachments" / last, folder / last)

    def lacks(folder: Path) -> None:
        shutil.copy(folder / first, folder / last)

    def both(folder: Path) -> None:
        many().write(folder)

    cases: dict[str, tuple[Any, str]] = {
        "missing": (lambda folder: (folder / last).unlink(), f"attachments is incomplete: {last} is missing"),
        "no index": (lambda folder: (folder / index).unlink(), f"attachments is incomplete: {index} is missing"),
        "cut": (cut, f"{last} is damaged or truncated"),
        "bad index": (lambda folder: (folder / index).write_text("[]"), f"{index} is not a valid index of shards"),
        "mixed": (mixed, f"{index} do not belong together"),
        "lacks": (lacks, f"{index} do not belong together"),
        "both": (both, "has chimera twice, in one file and in shards"),
    }
    for name, (damage, says) in cases.items():
        folder = save(tmp_path / name, many(), model)
        damage(folder)
        with pytest.raises(IntaglioError, match=says) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)
