"""Which code a record depends on, and a hash of what that code does: without importing it.

A hash is over the syntax tree without positions, comments and docstrings, so that formatting makes no record stale and
a changed constant does. Fields that are empty are left out, so that versions of Python which add fields to the tree
agree.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import intaglio
from intaglio.catalogue import ENTRIES
from intaglio.evidence.experiment import digest

PACKAGE = Path(intaglio.__file__).parent
SAYING = frozenset(
    f"intaglio{name}" for name in ("", ".catalogue", ".errors", ".writer", ".pictures", ".report", ".evidence")
)
"""Modules that tables, sentences, files and pictures come from, and no number: a new method in the catalogue makes no
record stale."""
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# What says how a tree was spelled or read, not what it does.
_IGNORED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})


def tree_hash(source: str) -> str:
    """SHA-256 of what a Python file does.

    Args:
        source: its text.
    """
    return hashlib.sha256(_spelled(ast.parse(source)).encode("utf-8", "surrogatepass")).hexdigest()


def _spelled(node: object) -> str:
    if isinstance(node, ast.AST):
        fields = {name: value for name, value in ast.iter_fields(node) if name not in _IGNORED}
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            fields["body"] = node.body[1:]
        # A constant's None is a value; elsewhere None and [] are absence.
        kept = [
            f"{name}={_spelled(value)}"
            for name, value in fields.items()
            if isinstance(node, ast.Constant) or not (value is None or value == [])
        ]
        return f"{type(node).__name__}({','.join(kept)})"
    if isinstance(node, list):
        return f"[{','.join(_spelled(item) for item in node)}]"
    return repr(node)


def _path(module: str) -> Path | None:
    """The file of a module of ours, or None."""
    parts = module.split(".")
    if parts[0] != PACKAGE.name:
        return None
    place = PACKAGE.joinpath(*parts[1:])
    for path in (place / "__init__.py", place.with_suffix(".py") if parts[1:] else place / "__init__.py"):
        if path.is_file():
            return path
    return None


def _only_for_types(node: ast.AST) -> bool:
    test = node.test if isinstance(node, ast.If) else None
    return "TYPE_CHECKING" in (getattr(test, "id", ""), getattr(test, "attr", ""))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if _only_for_types(child):
            continue
        yield child
        yield from _statements(child)


@cache
def _read(path: Path, module: str) -> tuple[str, tuple[str, ...]]:
    """A file's hash and the modules of ours that it imports, anywhere in it."""
    source = path.read_text(encoding="utf-8")
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: list[str] = []
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tree_hash(source), tuple(name for name in dict.fromkeys(found) if _path(name))


def hashes(roots: Iterable[str]) -> dict[str, str]:
    """The hash of each of our modules that is reached from some modules by imports, themselves included.

    Imports inside functions count, those for type checkers alone do not, nor do modules that only say things.

    Args:
        roots: names of modules of ours; a package stands for every file below it.
    """
    waiting = [name for root in roots for name in _members(root)]
    found: dict[str, str] = {}
    while waiting:
        module = waiting.pop()
        path = _path(module)
        if module in found or module in SAYING or path is None:
            continue
        found[module], imported = _read(path, module)
        waiting += imported
    return dict(sorted(found.items()))


def _members(module: str) -> list[str]:
    path = _path(module)
    if path is None or path.name != "__init__.py":
        return [module]
    below = sorted(path.parent.rglob("*.py"))
    names = [f"{module}.{'.'.join(p.relative_to(path.parent).with_suffix('').parts)}" for p in below]
    return [name.removesuffix(".__init__") for name in names]


def of_slug(slug: str) -> dict[str, str]:
    """Hashes of a method's experiment, its own files, and all they import of ours.

    Args:
        slug: of the method.
    """
    return hashes([f"intaglio.evidence.{slug}", ENTRIES[slug].module])


def together(parts: dict[str, str]) -> str:
    """One hash for all.

    Args:
        parts: from `hashes`.
    """
    return digest(parts)
