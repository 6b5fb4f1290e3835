"""The only place that writes results: into a temporary name beside the target, fsync, rename.

A process killed at any moment leaves the target absent (or as it was) or whole, never half-written. Temporary names
start with a dot and end in `.tmp-PID`; those of dead processes are swept by the next write to the same target.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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


def sweep(target: Path) -> None:
    """Remove temporary names that processes no longer alive left beside `target`.

    Args:
        target: the path whose leftovers are removed.
    """
    for left in target.parent.glob(f".{target.name}.tmp-*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _sentence(target: Path, error: OSError) -> IntaglioError:
    reason = error.strerror or str(error)
    return IntaglioError(f"cannot write {target}: {reason}; nothing was left behind")


def check_target(target: Path, overwrite: bool = False) -> None:
    """Refuse an output directory that holds something or cannot be made, before any work is done for it.

    Args:
        target: the directory that is to be written.
        overwrite: whether a directory that is there may be replaced. Default False.

    Raises:
        IntaglioError: the target is a file, or a directory that is not empty, or its parent cannot be written to.
    """
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
    temporary = target.absolute().parent / f".{target.name}.tmp-{os.getpid()}"
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        fsync_tree(temporary)
        if target.is_dir():
            # rename() replaces an empty directory; a full one is moved aside first, so that it is never half there.
            old = temporary.with_name(f".{target.name}.old.tmp-{os.getpid()}")
            os.rename(target, old)
            os.rename(temporary, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, target)
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
    temporary = target.absolute().parent / f".{target.name}.tmp-{os.getpid()}"
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
