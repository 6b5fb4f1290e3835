"""What a result is made with: versions, told without importing anything, torch's threads, libraries that keep still."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Run the block with this many of torch's threads.

    Args:
        threads: None leaves them as they are.
    """
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
    """Let these loggers say nothing but errors while the block runs.

    Args:
        names: of the loggers.
    """
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
