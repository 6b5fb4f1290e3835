"""The only place that writes results: into a temporary name beside the target, fsync, rename.

A process killed at any moment leaves the target absent (or as it was) or whole, never half-written. Temporary names
start with a dot and end in `.tmp-PID` (or `.old-PID`, for what is being replaced); those of dead processes are swept by
the next write to the same target.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from intaglio.errors import IntaglioError


def fsync_path(path: Path) -> None:
    """Flush one file or directory to the disk.

    Args:
        path: a regular file or a directory.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Flush every file and directory below `root`, and `root` itself, to the disk.

    Args:
        root: a directory.
    """
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


def _beside(target: Path, what: str) -> Path:
    """The name beside `target` that only this process uses."""
    return target.absolute().with_name(f".{target.name}.{what}-{os.getpid()}")


def _left(target: Path, what: str) -> list[Path]:
    """The names beside `target` of processes that are no longer alive."""
    found = target.absolute().parent.glob(f".{glob.escape(target.name)}.{what}-*")
    pids = ((path, path.name.rpartition("-")[2]) for path in found)
    return [path for path, pid in pids if pid.isdigit() and not _alive(int(pid))]


def sweep(target: Path) -> None:
    """Remove temporary names that processes no longer alive left beside `target`.

    A process that died between moving an old directory aside and putting the new one in its place left the old one
    under such a name; it is put back.

    Args:
        target: the path whose leftovers are removed.
    """
    old = _left(target, "old")
    if old and not os.path.lexists(target):
        os.rename(old.pop(), target)
    for left in [*old, *_left(target, "tmp")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _sentence(target: Path, error: OSError) -> IntaglioError:
    reason = error.strerror or str(error)
    if isinstance(error, FileExistsError):  # mkdir() found something else of that name
        reason = f"{error.filename} is not a directory"
    return IntaglioError(f"cannot write {target}: {reason}; nothing half-written was left")


def check_target(target: Path, overwrite: bool = False) -> None:
    """Refuse an output directory that holds something or cannot be made, before any work is done for it.

    Args:
        target: the directory that is to be written.
        overwrite: whether a directory that is there may be replaced. Default False.

    Raises:
        IntaglioError: the target is a file, or a directory that is not empty, or its parent cannot be written to.
    """
    try:
        _check_target(target, overwrite)
    except OSError as error:
        raise _sentence(target, error) from error


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


def _as_umask_says(root: Path) -> None:
    """Give everything below `root` the mode that a plain write would have; safetensors makes files only we can read."""
    mode = stat.S_IMODE(root.stat().st_mode)  # mkdir() applied the umask
    for directory, below, names in os.walk(root):
        for name in below:
            os.chmod(Path(directory, name), mode)
        for name in names:
            os.chmod(Path(directory, name), mode & 0o666)


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        os.rename(temporary, target)  # replaces an empty directory
        return
    # rename() does not replace a full one, so that is moved aside first; see `sweep` for a death in between.
    old = _beside(target, "old")
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def directory(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes `target` when the block ends without an error.

    Args:
        target: the directory to write; its parents are made.
        overwrite: replace a directory that is there. Default False: only an absent or empty one is accepted.

    Raises:
        IntaglioError: the target is taken, or the disk refuses (full, read-only, no permission).
    """
    target = Path(target)
    check_target(target, overwrite)
    temporary = _beside(target, "tmp")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _as_umask_says(temporary)
        fsync_tree(temporary)
        _put_in_place(temporary, target)
        fsync_path(target.absolute().parent)
    except OSError as error:
        raise _sentence(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(target: str | os.PathLike[str], content: bytes) -> None:
    """Write one file atomically, replacing what was there.

    Args:
        target: the file; its parents are made.
        content: what it will hold.

    Raises:
        IntaglioError: the disk refuses (full, read-only, no permission).
    """
    target = Path(target)
    temporary = _beside(target, "tmp")
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
        raise _sentence(target, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[IO[bytes]]:
    """Open a file for reading and appending, made if it is not there, that one process at a time may have.

    The lock goes with the process, however it ends.

    Args:
        path: the file; its parents are made.
        busy: the sentence that is raised when another process has it. Default None: wait until it has not.

    Raises:
        IntaglioError: another process has it, or the disk refuses.
    """
    made = not path.parent.exists()
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        if made:
            with suppress(OSError):
                path.parent.rmdir()
        raise IntaglioError(f"cannot write {path}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except OSError:
            raise IntaglioError(busy or f"cannot lock {path}") from None
        yield file


def append(file: IO[bytes], path: Path, content: bytes) -> None:
    """Add to an open file; when this returns it is on the disk.

    Args:
        file: opened for appending, see `locked`.
        path: of the file, for the sentence.
        content: what is added.

    Raises:
        IntaglioError: the disk refuses.
    """
    try:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise IntaglioError(f"cannot write {path}: {error.strerror}; what was there before is kept") from error


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write one UTF-8 file atomically; see `write_bytes`.

    Args:
        target: the file.
        text: what it will hold.
    """
    write_bytes(target, text.encode("utf-8"))


def to_json(value: Any) -> str:
    """Return `value` as indented JSON with a newline at the end; NaN and infinities are refused by raising ValueError.

    Args:
        value: anything `json.dumps` takes.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(target: str | os.PathLike[str], value: Any) -> None:
    """Write one JSON file atomically; see `to_json` and `write_bytes`.

    Args:
        target: the file.
        value: anything `json.dumps` takes.
    """
    write_text(target, to_json(value))
