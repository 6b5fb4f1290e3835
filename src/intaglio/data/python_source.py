"""Python source that every installation has: the standard library's and that of installed packages, without running it.

Tests, generated files and what is no UTF-8 are left out, and so is every file that holds the same bytes as one before
it. Nothing is imported to be found.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path

from intaglio.errors import IntaglioError, shorten

STANDARD_LIBRARY = "stdlib"
"""The name under which the standard library is asked for, beside those of packages."""

# `_sysconfigdata_*` is written when Python is built and names the builder's directories.
_LEFT_OUT = re.compile(r"site-packages|dist-packages|tests?|testing|idle_test|__pycache__|_sysconfigdata_.*|\..*")
_GENERATED = re.compile(rb"auto-?generated|automatically generated|generated (?:by|from|using) |do not edit", re.I)
_HEAD_LINES = 10
"""A generated file says so at its top."""


@dataclass(frozen=True)
class SourceFile:
    """One file of Python source.

    Args:
        package: `stdlib`, or the package that it was found in.
        module: its dotted name.
        text: its content, line ends as newlines.
        hash: SHA-256 (64 hexadecimal digits) of its bytes.
    """

    package: str
    module: str
    text: str
    hash: str


def source_files(packages: Iterable[str] = (STANDARD_LIBRARY,)) -> tuple[SourceFile, ...]:
    """The source of some packages, in the order in which they are named, each sorted by path.

    The standard library is that of the running interpreter.

    Args:
        packages: names of importable packages, and `stdlib`. Default the standard library alone.

    Raises:
        IntaglioError: no package of that name is installed, or it has no Python source.
    """
    return _distinct(file for package in dict.fromkeys(packages) for file in _of(package, _place(package)))


def source_folder(folder: str) -> tuple[SourceFile, ...]:
    """The Python source below any folder, as `source_files` gives it; its package is the folder's name.

    Args:
        folder: a directory.

    Raises:
        IntaglioError: it is no directory, or has no Python source.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise IntaglioError(f"the source folder {folder!r} is no directory")
    return _distinct(_of(root.resolve().name, root))


def sources_digest(files: Iterable[SourceFile]) -> str:
    """One SHA-256 over what some files hold, whatever their order: another Python or package version changes it.

    Args:
        files: from `source_files` or `source_folder`.
    """
    return hashlib.sha256("\n".join(sorted(file.hash for file in files)).encode("ascii")).hexdigest()


def _distinct(files: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
    """The first file of each content."""
    found: dict[str, SourceFile] = {}
    for file in files:
        found.setdefault(file.hash, file)
    return tuple(found.values())


def _place(package: str) -> Path:
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    # A top-level name only: to find a dotted one, its parent would be imported.
    spec = PathFinder.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise IntaglioError(
            f"no package {shorten(package)!r} is installed here, so its source cannot be read; name an importable"
            f" package, or {STANDARD_LIBRARY}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


@lru_cache(maxsize=16)
def _of(package: str, root: Path) -> tuple[SourceFile, ...]:
    files = []
    for path in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        if any(_LEFT_OUT.fullmatch(part) for part in parts):
            continue
        content = path.read_bytes()
        if not content.strip() or _GENERATED.search(b"\n".join(content.split(b"\n", _HEAD_LINES)[:_HEAD_LINES])):
            continue
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue  # such files name another encoding; there are a handful
        names = parts if package == STANDARD_LIBRARY else (package, *parts)
        files.append(
            SourceFile(
                package=package,
                module=".".join(names[:-1] if names[-1] == "__init__" else names),
                text=text.removeprefix("\ufeff").replace("\r\n", "\n"),
                hash=hashlib.sha256(content).hexdigest(),
            )
        )
    if not files:
        raise IntaglioError(f"{root} has no Python source (its files are absent, tests, generated or not UTF-8)")
    return tuple(files)
