"""Generate the registry's table from the class attributes of the methods (`make catalogue`).

Methods are found by convention: in an area, the class whose slug is the name of its module or package; in the packages
of `SHARED`, every method class with `kinds`.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from intaglio import atomic_io
from intaglio.methods.base import Method
from intaglio.methods.registry import AREAS, TABLE, Entry, area_package

SHARED = {"masks": "intaglio.masks", "trainer": "intaglio.trainer", "dictionaries": "intaglio.dictionaries"}
"""Packages with method classes that no paper describes."""


def _modules(package: str) -> Iterator[tuple[str, ModuleType]]:
    """Yield `(name, module)` for the modules directly in a package; none if there is no such package."""
    if find_spec(package) is not None:
        for module in pkgutil.iter_modules(import_module(package).__path__):
            yield module.name, import_module(f"{package}.{module.name}")


def discover() -> list[Entry]:
    """Return the entries of all methods, those with a citation first, by slug."""
    entries = []
    for area, package in ({area: area_package(area) for area in AREAS} | SHARED).items():
        for name, module in _modules(package):
            for _, cls in inspect.getmembers(module, inspect.isclass):
                here = issubclass(cls, Method) and cls.__module__ == module.__name__ and cls.kinds
                if here and (area in SHARED or cls.slug == name):
                    entries.append(
                        Entry(
                            slug=cls.slug,
                            area=area,
                            name=cls.__name__,
                            module=cls.__module__,
                            kinds=cls.kinds,
                            summary=cls.summary,
                            citation=cls.citation,
                            url=cls.url,
                            fitted=cls.fitted,
                        )
                    )
    return sorted(entries, key=lambda entry: (not entry.citation, entry.slug))


def main() -> None:
    """Write the table."""
    atomic_io.write_text(TABLE, atomic_io.to_json([asdict(entry) for entry in discover()]))


if __name__ == "__main__":
    main()
