"""A Python file taken apart, without running it: what each of its names is bound to, and what that makes use of.

What a file does when it is imported, beside binding names (calls, conditions, assignments to parts of objects), is
kept apart: it counts whatever is used of the file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# What says how a tree was spelled or read, not what it does.
_IGNORED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})


def spelled(node: object) -> str:
    """A syntax tree as text, without positions, comments and docstrings.

    Fields that are empty are left out, so that versions of Python which add fields to the tree agree.

    Args:
        node: a tree, a list of trees, or a constant.
    """
    if isinstance(node, ast.AST):
        fields = {name: value for name, value in ast.iter_fields(node) if name not in _IGNORED}
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            fields["body"] = node.body[1:]
        # A constant's None is a value; elsewhere None and [] are absence.
        kept = [
            f"{name}={spelled(value)}"
            for name, value in fields.items()
            if isinstance(node, ast.Constant) or not (value is None or value == [])
        ]
        return f"{type(node).__name__}({','.join(kept)})"
    if isinstance(node, list):
        return f"[{','.join(spelled(item) for item in node)}]"
    return repr(node)


@dataclass(frozen=True, eq=False)
class Parsed:
    """A module.

    Args:
        module: its dotted name.
        tree: its syntax tree.
        package: whether it is a package's `__init__`.
    """

    module: str
    tree: ast.Module
    package: bool

    @cached_property
    def statements(self) -> tuple[ast.stmt, ...]:
        """At the top, less what type checkers alone see."""
        return tuple(node for node in self.tree.body if not _only_for_types(node))

    @cached_property
    def _aliases(self) -> tuple[tuple[str, str], ...]:
        """`(as it is written where it is used, the dotted thing)` of the imports outside functions and classes."""
        found: list[tuple[str, str]] = []
        for node in _outside(self.statements):
            if isinstance(node, ast.Import):
                found += [(alias.asname or alias.name, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found += [(alias.asname or alias.name, target) for alias, target in self._from(node)]
        return tuple(found)

    @cached_property
    def imports(self) -> dict[str, str]:
        """`{name: the dotted thing that it stands for}`; `import a.b` binds a."""
        return {name.partition(".")[0]: name.partition(".")[0] if "." in name else to for name, to in self._aliases}

    @cached_property
    def bindings(self) -> dict[str, tuple[ast.stmt, ...]]:
        """`{name: the statements that bind it}`, imports left out."""
        found: dict[str, tuple[ast.stmt, ...]] = {}
        for statement in self.statements:
            for name in dict.fromkeys(_bound(statement)):
                found[name] = (*found.get(name, ()), statement)
        return found

    @cached_property
    def acts(self) -> tuple[ast.stmt, ...]:
        """Statements that do more than bind a name."""
        return tuple(node for node in self.statements if not _only_binds(node))

    @cached_property
    def for_effect(self) -> tuple[str, ...]:
        """What is imported and never named again: for what importing it does. A package's names are for others."""
        if self.package:
            return ()
        named = {use for node in self.statements for use in self.uses(node)}
        return tuple(
            target for name, target in self._aliases if not any(f"{use}.".startswith(f"{name}.") for use in named)
        )

    def uses(self, node: ast.AST) -> Iterator[str]:
        """Dotted names that a statement makes use of: `name.part.part` as written, or of an import inside it, whole.

        Names of local variables are among them. Annotations of functions and of their variables are not.

        Args:
            node: the statement.
        """
        yield from self._uses(node, within=False)

    def _uses(self, node: ast.AST, within: bool) -> Iterator[str]:
        if isinstance(node, ast.Name | ast.Attribute) and (chain := _chain(node)):
            yield chain
        elif isinstance(node, ast.Import) and within:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and within:
            yield from (name for _, name in self._from(node))
        elif not isinstance(node, ast.Import | ast.ImportFrom) and not _only_for_types(node):
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for name, value in ast.iter_fields(node):
                if (name == "annotation" and (within or isinstance(node, ast.arg))) or name == "returns":
                    continue
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from self._uses(child, within or function)

    def _from(self, node: ast.ImportFrom) -> Iterator[tuple[ast.alias, str]]:
        package = self.module if self.package else self.module.rpartition(".")[0]
        up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*up, *([node.module] if node.module else [])])
        for alias in node.names:
            yield alias, base if alias.name == "*" else f"{base}.{alias.name}"


def _chain(node: ast.AST) -> str:
    """`name.part.part` if that is what a node is, else nothing."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _only_for_types(node: ast.AST) -> bool:
    test = node.test if isinstance(node, ast.If) else None
    return "TYPE_CHECKING" in (getattr(test, "id", ""), getattr(test, "attr", ""))


def _outside(nodes: Any) -> Iterator[ast.AST]:
    """Nodes that are not inside a function or class, those themselves included."""
    for node in nodes:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _outside(ast.iter_child_nodes(node))


def _bound(statement: ast.stmt) -> Iterator[str]:
    for node in _outside([statement]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _only_binds(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        targets = [name for target in node.targets for name in getattr(target, "elts", [target])]
        return all(isinstance(name, ast.Name) for name in targets)
    if isinstance(node, ast.AnnAssign):
        return isinstance(node.target, ast.Name)
    # A docstring, or one of a constant.
    said = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    names = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom | ast.Pass
    return said or isinstance(node, names)
