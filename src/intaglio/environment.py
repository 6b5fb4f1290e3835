"""Reproducibility helpers: package versions, torch thread count, logger silencing."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("intaglio", "torch", "transformers", "tokenizers", "safetensors", "numpy")
"""Packages that affect the numbers of a carve."""


def versions(extra: Sequence[str] = ()) -> dict[str, str]:
    """Return the versions of Python and of packages, without importing them; `unknown` for missing ones."""
    result = {"python": platform.python_version()}
    for name in (*PACKAGES, *extra):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = "unknown"
    return result


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Run a block with this number of torch threads."""
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def silence_loggers(*names: str) -> Iterator[None]:
    """Silence loggers below errors while the block runs."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
