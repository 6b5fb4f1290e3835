"""Cached artifacts: concurrent processes, a killed build, changed choices and versions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.cache import CHOICES, cached


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_an_artifact_is_built_once(home: Path) -> None:
    calls = []

    def build(target: Path, scratch: Path) -> None:
        calls.append(1)
        assert not any(target.iterdir())
        (target / "file").write_text("content")

    first = cached("thing", {"size": 1}, build)
    assert cached("thing", {"size": 1}, build) == first
    assert first.parent == home / "testbeds"
    assert (first / "file").read_text() == "content"
    assert json.loads((first / CHOICES).read_text()) == {"size": 1, "version": 1}
    assert len(calls) == 1
    assert cached("thing", {"size": 2}, build) != first
    assert cached("other", {"size": 1}, build) != first
    assert cached("thing", {"size": 1}, build, version=2) != first
    assert len(calls) == 4


def test_a_killed_build_leaves_only_its_scratch_and_resumes(home: Path) -> None:
    def build(target: Path, scratch: Path) -> None:
        scratch.mkdir(exist_ok=True)
        steps = len(list(scratch.iterdir()))
        (scratch / str(steps)).touch()
        if steps < 2:
            raise KeyboardInterrupt
        (target / "steps").write_text(str(steps))

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            cached("thing", {}, build)
        assert not [path for path in home.glob("testbeds/*") if path.suffix not in (".lock", ".scratch")]
    place = cached("thing", {}, build)
    assert (place / "steps").read_text() == "2"
    assert {path.name for path in home.glob("testbeds/*")} == {place.name, f"{place.name}.lock"}


def test_concurrent_processes_build_once(home: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from intaglio.evidence.testbeds.cache import cached\n"
        "def build(target, scratch):\n"
        "    with open(sys.argv[1], 'a') as calls: calls.write('made\\n')\n"
        "    time.sleep(0.3)\n"
        "    (target / 'file').write_text('content')\n"
        "print(cached('thing', {}, build))"
    )
    calls = home.parent / "calls"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(calls)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    places = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(places) == 1
    assert calls.read_text() == "made\n"


def test_an_incomplete_artifact_is_rebuilt(home: Path) -> None:
    def build(target: Path, scratch: Path) -> None:
        (target / "file").write_text("content")

    place = cached("thing", {}, build)
    (place / CHOICES).unlink()
    (place / "file").write_text("damaged")
    assert (cached("thing", {}, build) / "file").read_text() == "content"


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path / "file"))
    with pytest.raises(IntaglioError, match=r"cannot write .*: Not a directory"):
        cached("thing", {}, lambda target, scratch: None)
