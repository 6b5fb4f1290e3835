"""The one writer: a target is absent (or as it was) or whole, whatever happens and whenever."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from intaglio import atomic_io
from intaglio.errors import IntaglioError

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 60
)


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def names(root: Path) -> list[str]:
    """Everything in a directory, hidden names too."""
    return sorted(os.listdir(root))


@pytest.fixture
def dead() -> int:
    """The number of a process that is no longer alive."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.fixture
def umask() -> Iterator[int]:
    old = os.umask(0o027)
    yield 0o027
    os.umask(old)


def fill(root: Path, text: str) -> None:
    (root / "a.txt").write_text(text)
    (root / "below").mkdir()
    (root / "below" / "b.txt").write_text(text * 2)


def fill_and_fail(root: Path, error: BaseException) -> None:
    fill(root, "new")
    raise error


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "parents" / "out"
    with atomic_io.directory(target) as temporary:
        fill(temporary, "x")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert tree(target) == {"a.txt": b"x", "below/b.txt": b"xx"}
    assert names(target.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_in_the_block_leaves_the_target_as_it_was(
    tmp_path: Path, error: BaseException, overwrite: bool
) -> None:
    target = tmp_path / "out"
    if overwrite:
        with atomic_io.directory(target) as temporary:
            fill(temporary, "old")
    before = tree(tmp_path)
    expected = IntaglioError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_io.directory(target, overwrite) as temporary:
        fill_and_fail(temporary, error)
    assert tree(tmp_path) == before
    assert names(tmp_path) == (["out"] if overwrite else [])


def test_an_empty_directory_is_taken_and_a_full_one_is_not(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with atomic_io.directory(target) as temporary:
        fill(temporary, "1")
    with pytest.raises(IntaglioError, match=r"out exists and is not empty; name another one or overwrite it"):
        atomic_io.directory(target).__enter__()
    with atomic_io.directory(target, overwrite=True) as temporary:
        (temporary / "only").write_text("2")
        assert tree(target)["a.txt"] == b"1"  # the old one stands until the new one is whole
    assert tree(target) == {"only": b"2"}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("link", [False, True])
def test_a_file_or_a_link_in_the_place_is_refused(tmp_path: Path, link: bool) -> None:
    target, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    target.symlink_to(other) if link else target.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(IntaglioError, match="exists and is not a directory"):
            atomic_io.check_target(target, overwrite)
    assert names(other) == []


def test_a_file_among_the_parents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(IntaglioError, match="file is not a directory"):
        atomic_io.check_target(tmp_path / "file" / "out")
    with pytest.raises(IntaglioError, match=r"cannot write .*file is not a directory"):
        atomic_io.write_text(tmp_path / "file" / "out.txt", "x")


def test_a_parent_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_io.os, "access", lambda path, mode: False)
    with pytest.raises(IntaglioError, match="no permission to write in"):
        atomic_io.check_target(tmp_path / "out")


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    for write in (atomic_io.check_target, lambda path: atomic_io.write_text(path, "x")):
        with pytest.raises(IntaglioError, match="File name too long"):
            write(tmp_path / ("x" * 300))
    assert names(tmp_path) == []


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "f.json"
    atomic_io.write_json(target, {"a": 1})
    atomic_io.write_json(target, {"a": [None, "ö"]})
    assert target.read_text(encoding="utf-8") == '{\n  "a": [\n    null,\n    "ö"\n  ]\n}\n'
    assert names(target.parent) == ["f.json"]


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "pointee").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "pointee")
    atomic_io.write_text(tmp_path / "link", "new")
    assert (tmp_path / "pointee").read_text() == "mine"
    assert not (tmp_path / "link").is_symlink()


def test_not_a_number_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic_io.write_json(tmp_path / "f", {"a": float("nan")})
    assert names(tmp_path) == []


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _denied(*_: Any) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
@pytest.mark.parametrize(("fail", "says"), [(_full, "No space left on device"), (_denied, "Permission denied")])
def test_a_disk_that_refuses_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, fail: Any, says: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(atomic_io.os, call, fail)
        with pytest.raises(IntaglioError) as found, atomic_io.directory(tmp_path / "out") as temporary:
            (temporary / "a").write_text("x")
    assert str(found.value) == f"cannot write {tmp_path / 'out'}: {says}; nothing half-written was left"
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    atomic_io.write_text(tmp_path / "f", "old")
    with monkeypatch.context() as patch:
        patch.setattr(atomic_io.os, call, _full)
        with pytest.raises(IntaglioError, match="No space left on device"):
            atomic_io.write_text(tmp_path / "f", "new")
    assert tree(tmp_path) == {"f": b"old"}


def test_the_old_directory_is_put_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "out", os.rename
    with atomic_io.directory(target) as temporary:
        fill(temporary, "old")

    def second_fails(source: Any, destination: Any) -> None:
        if ".tmp-" in str(source):
            _full()
        rename(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_io.os, "rename", second_fails)
        with pytest.raises(IntaglioError), atomic_io.directory(target, overwrite=True) as temporary:
            fill(temporary, "new")
    assert tree(target)["a.txt"] == b"old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["out", "o[u]t*", "-"])
def test_leftovers_of_the_dead_are_swept_and_of_nobody_else(tmp_path: Path, dead: int, name: str) -> None:
    for left in (f".{name}.tmp-{dead}", f".{name}.old-{dead}"):
        (tmp_path / left / "below").mkdir(parents=True)
    (tmp_path / f".{name}.tmp-{os.getppid()}").write_text("alive")
    (tmp_path / f".other.tmp-{dead}").write_text("another target's")
    (tmp_path / f".{name}.tmp-notes").write_text("the user's")
    (tmp_path / name).mkdir()
    with atomic_io.directory(tmp_path / name):
        pass
    kept = [f".{name}.tmp-{os.getppid()}", f".{name}.tmp-notes", f".other.tmp-{dead}", name]
    assert names(tmp_path) == sorted(kept)


def test_the_old_directory_of_one_who_died_while_replacing_it_is_put_back(tmp_path: Path, dead: int) -> None:
    old = tmp_path / f".out.old-{dead}"
    old.mkdir()
    (old / "a").write_text("old")
    atomic_io.sweep(tmp_path / "out")
    assert tree(tmp_path) == {"out/a": b"old"}


def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    target = tmp_path / "out"
    with atomic_io.directory(target) as temporary:
        save_file({"w": torch.zeros(2)}, temporary / "w.safetensors")  # makes files that only we can read
        Path(tempfile.mkdtemp(dir=temporary), "x").write_text("x")
    atomic_io.write_text(tmp_path / "f", "x")
    for path in [target, *target.rglob("*"), tmp_path / "f"]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


@settings(max_examples=30)
@given(st.dictionaries(NAMES, st.binary(max_size=50), max_size=4), st.dictionaries(NAMES, st.binary(), max_size=4))
def test_what_is_written_is_what_is_there(first: dict[str, bytes], second: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as place:
        target = Path(place, "out")
        for files in (first, second):
            with atomic_io.directory(target, overwrite=True) as temporary:
                for name, content in files.items():
                    atomic_io.write_bytes(temporary / name, content)
            assert tree(target) == files
        assert names(Path(place)) == ["out"]


_WRITE_FOR_EVER = """
import sys
from pathlib import Path
from intaglio import atomic_io
target, count = Path(sys.argv[1]), 0
print("begun", flush=True)
while True:
    count += 1
    with atomic_io.directory(target, overwrite=True) as temporary:
        for name in "abcdef":
            (temporary / name).write_text(str(count) * 1000)
    atomic_io.write_json(target.with_suffix(".json"), [count] * 1000)
"""


def test_killed_at_any_moment_the_target_is_absent_or_whole(tmp_path: Path) -> None:
    target, draw = tmp_path / "out", random.Random(0)
    for _ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", _WRITE_FOR_EVER, str(target)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"begun\n"
        time.sleep(draw.uniform(0, 0.03))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if target.exists():
            assert names(target) == list("abcdef")
            assert len(set(tree(target).values())) == 1
            assert len(tree(target)["a"]) >= 1000
        if target.with_suffix(".json").exists():
            assert len(json.loads(target.with_suffix(".json").read_bytes())) == 1000
    with atomic_io.directory(target, overwrite=True) as temporary:
        (temporary / "a").write_text("last")
    atomic_io.write_json(target.with_suffix(".json"), [])
    assert names(tmp_path) == ["out", "out.json"]
    assert tree(target) == {"a": b"last"}
