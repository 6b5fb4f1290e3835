"""The machine and its software: package versions, processor, cache directory, torch thread count, logger silencing.

`tuning` keeps the choices that are made by measurement on this machine.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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


def releases(extra: Sequence[str] = ()) -> dict[str, str]:
    """Return `versions` without local parts, such as torch's +cpu."""
    return {name: number.partition("+")[0] for name, number in versions(extra).items()}


def cache_dir() -> Path:
    """Return the cache directory: $INTAGLIO_HOME, $XDG_CACHE_HOME/intaglio or ~/.cache/intaglio."""
    if home := os.environ.get("INTAGLIO_HOME"):
        return Path(home).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache") / "intaglio"


@lru_cache(maxsize=1)
def processor() -> str:
    """Return the processor's name, family and number of cores: `AMD EPYC 7B13 (family 25, model 1, 2 cores)`."""
    fields: dict[str, str] = {}
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    family = [f"{part} {fields[key]}" for part, key in (("family", "cpu family"), ("model", "model")) if key in fields]
    return f"{name} ({', '.join([*family, f'{os.cpu_count()} cores'])})"


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
