"""Helpers shared by the kernels: availability of packages, tensor descriptions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle

from torch import Tensor


@lru_cache
def works(package: str, kernel: str, otherwise: str) -> bool:
    """Return whether a package can be imported (a numba too old for the installed numpy cannot); warn once if not."""
    if find_spec(package) is None:
        warnings.warn(f"{otherwise}, as {package} is not installed (pip install 'intaglio[kernels]')", stacklevel=3)
        return False
    try:
        import_module(f"intaglio.kernels.{kernel}_{package}")
    except ImportError as error:
        warnings.warn(f"{otherwise}, as {package} fails: {error}", stacklevel=3)
        return False
    return True


_BYTES = 24 << 20
"""Bytes of the copies of a weight; the weights of two candidates are measured in turn."""


def copies(tensor: Tensor) -> Iterator[Tensor]:
    """Yield copies in turn, for ever, of so many bytes that a cache hardly holds them; for measuring products."""
    yield from cycle([tensor.clone() for _ in range(min(64, max(1, _BYTES // max(1, tensor.nbytes))))])


def describe_tensor(tensor: Tensor) -> str:
    """Return shape and dtype for a message: `4x3 of float32`."""
    return f"{'x'.join(map(str, tensor.shape)) or 'a scalar'} of {str(tensor.dtype).removeprefix('torch.')}"


__all__ = ["copies", "describe_tensor", "works"]
