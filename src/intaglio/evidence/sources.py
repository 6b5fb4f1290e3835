"""Which code a record depends on, and a hash of what that code does: without importing it.

A method's experiment and its own files count whole. Of all else of ours what counts is what they reach: a function that
is used, what that uses, and so on, whatever file it stands in. So a change of what everything shares makes stale the
records that go through what changed, and no other.

A hash is over the syntax tree without positions, comments and docstrings: formatting makes no record stale, a changed
constant does.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import intaglio
from intaglio.evidence.experiment import digest
from intaglio.evidence.parsed import Parsed, spelled
from intaglio.methods.registry import PUBLISHED

PACKAGE = Path(intaglio.__file__).parent
SAYING = frozenset(
    f"intaglio{name}" for name in ("", ".registry", ".errors", ".writer", ".pictures", ".report", ".evidence")
)
"""Modules that tables, sentences, files and pictures come from, and no number: a new method in the catalogue makes no
record stale."""
CHOOSING = frozenset({"intaglio.evidence.experiment"})
"""What a claim is made of. It decides choices and seeds, and a record has both, raw: a test compares them."""
MADE_WITH = {"intaglio.data.assets": "intaglio.data.assets._CONVERTERS"}
"""`{where data lie that were made earlier: what made them}`: that counts too, although no run goes through it."""


def tree_hash(source: str) -> str:
    """SHA-256 of what a Python file does.

    Args:
        source: its text.
    """
    return _hash(spelled(ast.parse(source)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


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


@cache
def _read(path: Path, module: str) -> Parsed:
    return Parsed(module, ast.parse(path.read_text(encoding="utf-8")), path.name == "__init__.py")


def _parsed(module: str) -> Parsed | None:
    path = _path(module)
    return None if path is None else _read(path, module)


def _located(dotted: str) -> tuple[Parsed, str] | None:
    """The module that a dotted name lies in, and its name there ("" for the module as a whole); None if not ours."""
    parts = dotted.split(".")
    if parts[0] != PACKAGE.name:
        return None
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        if (found := _parsed(module)) is not None:
            return None if module in SAYING | CHOOSING else (found, parts[count] if count < len(parts) else "")
    return None


class _Walk:
    """What is reached from some modules: statements of each, and the names that its imports give."""

    def __init__(self) -> None:
        self.whole: set[str] = set()
        self.statements: dict[str, set[ast.stmt]] = {}
        self.imported: dict[str, set[str]] = {}
        self._waiting: list[tuple[Parsed, str]] = []
        self._seen: set[tuple[str, str]] = set()

    def reach(self, dotted: str) -> None:
        """A thing of ours, and all that it uses.

        Args:
            dotted: its name; a module's name is the module as a whole.
        """
        self._want(dotted)
        while self._waiting:
            self._take(*self._waiting.pop())

    def _want(self, dotted: str) -> None:
        found = _located(dotted)
        if found is not None and (found[0].module, found[1]) not in self._seen:
            self._seen.add((found[0].module, found[1]))
            self._waiting.append(found)

    def _take(self, parsed: Parsed, name: str) -> None:
        if parsed.module not in self.statements:
            self.statements[parsed.module], self.imported[parsed.module] = set(), set()
            self._add(parsed, parsed.acts)
            for target in parsed.for_effect:
                self._want(target)
        if name in parsed.imports:
            self._import(parsed, name, name)
        if name in parsed.bindings:
            self._add(parsed, parsed.bindings[name])
        elif name not in parsed.imports:
            # The module itself, or a name that it makes in a way that cannot be seen.
            self.whole.add(parsed.module)
            self._add(parsed, parsed.statements)

    def _add(self, parsed: Parsed, statements: Iterable[ast.stmt]) -> None:
        have = self.statements[parsed.module]
        for statement in statements:
            if statement in have:
                continue
            have.add(statement)
            for use in parsed.uses(statement):
                first = use.partition(".")[0]
                if first in parsed.imports:
                    self._import(parsed, first, use)
                if first in parsed.bindings:
                    self._add(parsed, parsed.bindings[first])
                elif first not in parsed.imports:
                    self._want(use)  # of an import inside a function; a local variable is nothing of ours

    def _import(self, parsed: Parsed, name: str, use: str) -> None:
        self.imported[parsed.module].add(name)
        self._want(parsed.imports[name] + use.removeprefix(name))

    def hash_of(self, module: str) -> str:
        """The hash of what is reached of a module.

        Args:
            module: that was reached.
        """
        parsed = _parsed(module)
        assert parsed is not None
        if module in self.whole:
            return _hash(spelled(parsed.tree))
        imports = [f"{name}={parsed.imports[name]}" for name in sorted(self.imported[module])]
        kept = self.statements[module]
        return _hash("\n".join([*imports, *(spelled(node) for node in parsed.statements if node in kept)]))


def hashes(roots: Iterable[str]) -> dict[str, str]:
    """A hash for each of our modules that some modules reach, themselves included.

    The roots are hashed whole, other modules by what of them is reached: a module of which one function is used is
    hashed over that function, what it uses, and what importing the module does. Imports inside functions count, those
    for type checkers alone do not, nor do modules that only say things.

    Args:
        roots: names of modules of ours; a package stands for every file below it.
    """
    walk = _Walk()
    for root in roots:
        for module in _members(root):
            walk.reach(module)
    for module, makers in MADE_WITH.items():
        if module in walk.statements:
            walk.reach(makers)
    return {module: walk.hash_of(module) for module in sorted(walk.statements)}


def _members(module: str) -> list[str]:
    path = _path(module)
    if path is None or path.name != "__init__.py":
        return [module]
    below = sorted(path.parent.rglob("*.py"))
    names = [f"{module}.{'.'.join(p.relative_to(path.parent).with_suffix('').parts)}" for p in below]
    return [name.removesuffix(".__init__") for name in names]


def of_slug(slug: str) -> dict[str, str]:
    """Hashes of a method's experiment, its own files, and all they reach of ours.

    Args:
        slug: of the method.
    """
    return hashes([f"intaglio.evidence.{slug}", PUBLISHED[slug].module])


def together(parts: dict[str, str]) -> str:
    """One hash for all.

    Args:
        parts: from `hashes`.
    """
    return digest(parts)
