"""Atomic writes of files and directories: a temporary name beside the target, fsync, rename.

A process killed at any moment leaves the target absent (or unchanged) or complete, never half-written. Temporary names
start with a dot and end in `.tmp-PID` (or `.old-PID`, for a target being replaced); those of dead processes are removed
by the next write to the same target.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from intaglio.errors import IntaglioError


def fsync_path(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Flush every file and directory below `root`, and `root` itself, to disk."""
    for directory, _, names in os.walk(root):
        for name in names:
            fsync_path(Path(directory, name))
        fsync_path(Path(directory))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _temporary_name(target: Path, what: str) -> Path:
    """Return the temporary name beside `target` for this process."""
    return target.absolute().with_name(f".{target.name}.{what}-{os.getpid()}")


def _leftovers(target: Path, what: str) -> list[Path]:
    """Return the temporary names beside `target` of dead processes."""
    paths = target.absolute().parent.glob(f".{glob.escape(target.name)}.{what}-*")
    pids = ((path, path.name.rpartition("-")[2]) for path in paths)
    return [path for path, pid in pids if pid.isdigit() and not _alive(int(pid))]


def sweep(target: Path) -> None:
    """Remove temporary names of dead processes beside `target`.

    A process that died between moving an old directory aside and renaming the new one left the old one under such a
    name; it is restored.
    """
    old = _leftovers(target, "old")
    if old and not os.path.lexists(target):
        os.rename(old.pop(), target)
    for leftover in [*old, *_leftovers(target, "tmp")]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _write_error(target: Path, error: OSError) -> IntaglioError:
    reason = error.strerror or str(error)
    if isinstance(error, FileExistsError):  # from mkdir()
        reason = f"{error.filename} is not a directory"
    return IntaglioError(f"cannot write {target}: {reason}; nothing half-written was left")


def check_target(target: Path, overwrite: bool = False) -> None:
    """Refuse an output directory that is not empty or cannot be created, before any work is done."""
    try:
        _check_target(target, overwrite)
    except OSError as error:
        raise _write_error(target, error) from error


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise IntaglioError(f"the output {target} exists and is not a directory; name another one")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise IntaglioError(f"the output directory {target} exists and is not empty; name another one or overwrite it")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise IntaglioError(f"cannot write {target}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise IntaglioError(f"cannot write {target}: no permission to write in {parent}")


def _apply_umask(root: Path) -> None:
    """Apply the umask below `root`: safetensors creates files that only the user can read."""
    mode = stat.S_IMODE(root.stat().st_mode)  # mkdir() applied the umask
    for directory, below, names in os.walk(root):
        for name in below:
            os.chmod(Path(directory, name), mode)
        for name in names:
            os.chmod(Path(directory, name), mode & 0o666)


def _replace(temporary: Path, target: Path) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        os.rename(temporary, target)  # replaces an empty directory
        return
    # rename() does not replace a non-empty one, so it is moved aside first; see `sweep` for a crash in between.
    old = _temporary_name(target, "old")
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def directory(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes `target` when the block ends without an error."""
    target = Path(target)
    check_target(target, overwrite)
    temporary = _temporary_name(target, "tmp")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _apply_umask(temporary)
        fsync_tree(temporary)
        _replace(temporary, target)
        fsync_path(target.absolute().parent)
    except OSError as error:
        raise _write_error(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(target: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically, replacing an existing one."""
    target = Path(target)
    temporary = _temporary_name(target, "tmp")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        fsync_path(target.absolute().parent)
    except OSError as error:
        raise _write_error(target, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, busy: str | None = None, timeout: float = 0.0) -> Iterator[IO[bytes]]:
    """Open a file for reading and appending, created if missing, under an exclusive lock of this process.

    The lock is released when the process ends, however it ends. With `busy`, that sentence is raised if another process
    has held it for `timeout` seconds; without, it is awaited.
    """
    created = not path.parent.exists()
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        if created:
            with suppress(OSError):
                path.parent.rmdir()
        raise IntaglioError(f"cannot write {path}: {error.strerror or error}") from error
    with file:
        end = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
                break
            except OSError:
                if time.monotonic() >= end:
                    raise IntaglioError(busy or f"cannot lock {path}") from None
                time.sleep(0.02)
        yield file


def append(file: IO[bytes], path: Path, content: bytes) -> None:
    """Append to an open file and flush it to disk."""
    try:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise IntaglioError(f"cannot write {path}: {error.strerror}; what was there before is kept") from error


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file atomically; see `write_bytes`."""
    write_bytes(target, text.encode("utf-8"))


def to_json(value: Any) -> str:
    """Return `value` as indented JSON with a final newline; raise ValueError for NaN and infinities."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(target: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file atomically; see `to_json` and `write_bytes`."""
    write_text(target, to_json(value))
