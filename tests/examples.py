"""The conformance examples of every published method: `EXAMPLES` in its own test file."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from intaglio.methods.registry import PUBLISHED

EXAMPLES: dict[str, tuple[dict[str, Any], ...]] = {
    slug: import_module(f"tests.methods.{entry.area}.test_{slug}").EXAMPLES for slug, entry in PUBLISHED.items()
}
"""`{slug: fields of the method, a dict for each example}`."""
