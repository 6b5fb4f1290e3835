"""What is made once: two processes at a time, one that is killed, one whose choices change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from intaglio.errors import IntaglioError
from intaglio.evidence.worlds.made import CHOICES, code_of, made


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_it_is_made_once_and_found_again(home: Path) -> None:
    calls = []

    def make(target: Path, scratch: Path) -> None:
        calls.append(1)
        assert not any(target.iterdir())
        (target / "file").write_text("content")

    first = made("thing", {"size": 1}, make)
    assert made("thing", {"size": 1}, make) == first
    assert first.parent == home / "worlds"
    assert (first / "file").read_text() == "content"
    assert json.loads((first / CHOICES).read_text()) == {"size": 1}
    assert len(calls) == 1
    assert made("thing", {"size": 2}, make) != first
    assert made("other", {"size": 1}, make) != first
    assert len(calls) == 3


def test_what_failed_leaves_nothing_but_its_scratch_and_goes_on(home: Path) -> None:
    def make(target: Path, scratch: Path) -> None:
        scratch.mkdir(exist_ok=True)
        steps = len(list(scratch.iterdir()))
        (scratch / str(steps)).touch()
        if steps < 2:
            raise KeyboardInterrupt
        (target / "steps").write_text(str(steps))

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            made("thing", {}, make)
        assert not [path for path in home.glob("worlds/*") if path.suffix not in (".lock", ".scratch")]
    place = made("thing", {}, make)
    assert (place / "steps").read_text() == "2"
    assert {path.name for path in home.glob("worlds/*")} == {place.name, f"{place.name}.lock"}


def test_processes_that_ask_at_the_same_time_make_it_once(home: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from intaglio.evidence.worlds.made import made\n"
        "def make(target, scratch):\n"
        "    with open(sys.argv[1], 'a') as calls: calls.write('made\\n')\n"
        "    time.sleep(0.3)\n"
        "    (target / 'file').write_text('content')\n"
        "print(made('thing', {}, make))"
    )
    calls = home.parent / "calls"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(calls)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    places = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(places) == 1
    assert calls.read_text() == "made\n"


def test_a_half_made_one_is_made_again(home: Path) -> None:
    def make(target: Path, scratch: Path) -> None:
        (target / "file").write_text("content")

    place = made("thing", {}, make)
    (place / CHOICES).unlink()
    (place / "file").write_text("damaged")
    assert (made("thing", {}, make) / "file").read_text() == "content"


def test_the_code_that_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    found = code_of("intaglio.data.docstrings")
    assert list(found) == ["intaglio.data.docstrings"]
    assert "intaglio.trainer.loop" in code_of("intaglio.trainer")
    assert not any(name.startswith("intaglio.checkpoint") for name in code_of("intaglio.trainer"))


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path / "file"))
    with pytest.raises(IntaglioError, match=r"cannot write .*: Not a directory"):
        made("thing", {}, lambda target, scratch: None)
