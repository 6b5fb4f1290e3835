"""Count lines of code, docstrings and comments for each package: `python tools/count.py [--root src/intaglio]`.

Docstring lines are the non-blank lines of string expressions (module, class, function and attribute docstrings). Code
lines are the non-blank lines that are neither docstring nor comment. Lines are all lines of a file.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from pathlib import Path


def count(source: str) -> Counter[str]:
    """Return the numbers of lines, code lines, docstring lines and comment lines of a Python source."""
    lines = source.splitlines()
    docstrings = {
        number
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    result: Counter[str] = Counter(lines=len(lines))
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text:
            kind = "docstring" if number in docstrings else "comment" if text.startswith("#") else "code"
            result[kind] += 1
    return result


def main() -> None:
    """Print a table: one row a package, then the total with and without `evidence`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("src/intaglio"), help="the package to count")
    root = parser.parse_args().root
    packages: dict[str, Counter[str]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        name = "/".join(parts[: 2 if parts[0] == "methods" else 1][: max(1, len(parts) - 1)])
        packages.setdefault(name, Counter()).update(count(path.read_text()))
    packages["total"] = sum(packages.values(), Counter())
    packages["total without evidence"] = packages["total"] - packages.get("evidence", Counter())
    print(f"{'package':28}{'lines':>8}{'code':>8}{'docstring':>11}{'comment':>9}{'ratio':>7}")
    for name, total in packages.items():
        ratio = total["docstring"] / max(1, total["code"])
        print(f"{name:28}{total['lines']:8}{total['code']:8}{total['docstring']:11}{total['comment']:9}{ratio:7.2f}")


if __name__ == "__main__":
    main()
