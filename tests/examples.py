"""The conformance examples of every published method: `EXAMPLES` in its own test file."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from intaglio.methods.registry import PUBLISHED

TEST_FILES = {slug: import_module(f"tests.methods.{entry.area}.test_{slug}") for slug, entry in PUBLISHED.items()}
EXAMPLES: dict[str, tuple[dict[str, Any], ...]] = {slug: file.EXAMPLES for slug, file in TEST_FILES.items()}
"""`{slug: fields of the method, a dict for each example}`."""
