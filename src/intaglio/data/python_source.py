"""Python source of the standard library and of installed packages, found without importing or running it.

Tests, generated files, files that are not UTF-8 and duplicates are left out.
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
"""Name of the standard library among package names."""

# `_sysconfigdata_*` is written when Python is built and names the builder's directories.
_LEFT_OUT = re.compile(r"site-packages|dist-packages|tests?|testing|idle_test|__pycache__|_sysconfigdata_.*|\..*")
_GENERATED = re.compile(rb"auto-?generated|automatically generated|generated (?:by|from|using) |do not edit", re.I)
_HEAD_LINES = 10
"""Lines at the top of a file that are searched for it."""


@dataclass(frozen=True)
class SourceFile:
    """A file of Python source, with its package, dotted module name and the SHA-256 of its bytes."""

    package: str
    module: str
    text: str
    hash: str


def source_files(packages: Iterable[str] = (STANDARD_LIBRARY,)) -> tuple[SourceFile, ...]:
    """Return the source of packages in the given order, each sorted by path; `stdlib` is the running interpreter's."""
    return _distinct(file for package in dict.fromkeys(packages) for file in _read(package, _root_of(package)))


def source_folder(folder: str) -> tuple[SourceFile, ...]:
    """Return the Python source below a folder, with the folder's name as package."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise IntaglioError(f"the source folder {folder!r} is not a directory")
    return _distinct(_read(root.resolve().name, root))


def sources_digest(files: Iterable[SourceFile]) -> str:
    """Return a SHA-256 over the contents of files in any order; it changes with Python and package versions."""
    return hashlib.sha256("\n".join(sorted(file.hash for file in files)).encode("ascii")).hexdigest()


def _distinct(files: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
    """Return the first file of each content."""
    first: dict[str, SourceFile] = {}
    for file in files:
        first.setdefault(file.hash, file)
    return tuple(first.values())


def _root_of(package: str) -> Path:
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
def _read(package: str, root: Path) -> tuple[SourceFile, ...]:
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
            continue  # a few files in another encoding
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
