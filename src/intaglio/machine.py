"""What a result was made with, without importing any of it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("intaglio", "torch", "transformers", "tokenizers", "safetensors", "numpy")
"""What decides the numbers of a carve."""


def versions(also: Sequence[str] = ()) -> dict[str, str]:
    """Versions of everything that decides a result, Python's first; `unknown` for what is not installed as a package.

    Args:
        also: further packages. Default: none.
    """
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *also):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
