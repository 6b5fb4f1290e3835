"""The command `index upgrade`, with tiny encoders; the engine is tested in `tests/search`."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from intaglio.search import Index
from tests.cli.test_search import document, refused, run
from tests.conftest import TinyDir

ROWS = [{"id": str(n), "text": f"number {n} {'fox' if n % 2 else 'dog'} jumps over {n % 5} stones"} for n in range(30)]


@pytest.fixture
def old(tiny_dir: TinyDir, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir("bert"), tmp_path / "old"))


@pytest.fixture
def new(tiny_dir: TinyDir, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir("llama"), tmp_path / "new"))


@pytest.fixture
def index(old: Path, tmp_path: Path) -> Path:
    docs, path = tmp_path / "docs.jsonl", tmp_path / "index"
    docs.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    pairs = [{"query": f"{row['text'][:14]}", "document": row["id"]} for row in ROWS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    (tmp_path / "log.txt").write_text("dog stones\n\nfox stones\nfox number\ndog number 7\n", encoding="utf-8")
    run("index", docs, "-o", path, "--encoder", old)
    return path


def test_upgrade_prints_its_report_and_info_the_vectors(index: Path, new: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    shown = run("index", "upgrade", index, "--encoder", new, "--pairs", pairs, "--steps", 3, "--set", "extra_dims=4")
    for word in ("held-out queries, 30 documents", "old/old", "new/old", "new/new", "re-embedded", "30 chunks encoded"):
        assert word in shown.stdout
    info = document("index", "info", index)
    assert info["encoder"]["head"]["arm"] == "bt2"
    assert info["encoder"]["dimensions"] == 36
    assert [own["chunks"] for own in info["vectors"].values()] == [30]
    assert len(document("search", index, "dog stones")["hits"]) == 10
    assert "vectors" in run("index", "info", index).stdout
    again = document("index", "upgrade", index)
    assert (again["encoded"], again["left"], again["method"]) == (0, 0, "bt2")


def test_options_reach_the_upgrade(index: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def upgrade(self: Index, encoder: Any, **options: Any) -> Any:
        given.update(options, encoder=encoder)
        return {"report": None, "encoded": 1, "left": 2, "seconds": 3.0}

    monkeypatch.setattr(Index, "upgrade", upgrade)
    words = ["--encoder", new, "--method", "bct", "--queries", tmp_path / "log.txt", "--rate", 2.5, "--sample", 7]
    shown = run("index", "upgrade", index, *words, "--steps", 9, "--set", "scale=3.0")
    assert "1 chunks encoded in 3.0 s, 2 left" in shown.stdout
    del given["progress"]
    assert given == {
        "encoder": str(new), "method": "bct", "judged": None, "rate": 2.5, "sample": 7, "steps": 9,
        "queries": ["dog stones", "fox stones", "fox number", "dog number 7"], "fields": {"scale": 3.0},
        "reencode": True,
    }  # fmt: skip
    started: list[Any] = []
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **more: started.append(command) or type("P", (), {"pid": 5})
    )
    result = document("index", "upgrade", index, "--background", "--rate", 4.0, "--device", "cpu")
    assert (result["process"], given["reencode"]) == (5, False)
    assert started[0][3:] == ["index", "upgrade", str(index), "--rate", "4.0", "--device", "cpu"]


def test_bad_upgrades_are_one_sentence(index: Path, old: Path, new: Path, tmp_path: Path) -> None:
    pairs, log = tmp_path / "pairs.jsonl", tmp_path / "log.txt"
    assert "no upgrade of" in refused("index", "upgrade", index)
    assert "at most one of both" in refused("index", "upgrade", index, "--pairs", pairs, "--queries", log)
    assert "cannot read the queries" in refused("index", "upgrade", index, "--queries", tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    assert "is empty; one query a line" in refused("index", "upgrade", index, "--queries", tmp_path / "empty")
    assert "method is 'lora'; accepted" in refused("index", "upgrade", index, "--encoder", new, "--method", "lora")
    assert "already; name another encoder" in refused("index", "upgrade", index, "--encoder", old)
    assert "scale: 'x' is not accepted" in refused("index", "upgrade", index, "--encoder", new, "--set", "scale=x")
    assert "nowhere" in refused("index", "upgrade", index, "--encoder", tmp_path / "nowhere")
    assert document("index", "info", index)["version"] == 1


@pytest.mark.slow
def test_a_process_in_the_background_finishes(index: Path, new: Path) -> None:
    result = document("index", "upgrade", index, "--encoder", new, "--steps", "3", "--background")
    assert (result["left"], result["encoded"]) == (30, 0)
    assert len(document("search", index, "dog stones")["hits"]) == 10
    end = time.monotonic() + 120
    while document("index", "info", index)["upgrade"]["state"] != "done" and time.monotonic() < end:
        time.sleep(0.5)
    assert document("index", "info", index)["upgrade"]["state"] == "done"
    assert "30 chunks encoded" in (index / "upgrade.log").read_text()
