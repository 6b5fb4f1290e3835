"""What the kernels share beside their code: whether the package that one needs works, and tensors in words."""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

from torch import Tensor


@lru_cache
def works(package: str, kernel: str, otherwise: str) -> bool:
    """Whether a package is there and works; a numba that is too old for the numpy beside it cannot be imported.

    Args:
        package: `numba` or `triton`.
        kernel: what needs it: `gather` for `gather_numba`.
        otherwise: what happens without it, for the warning where it is there and fails.
    """
    if find_spec(package) is None:
        return False
    try:
        import_module(f"intaglio.kernels.{kernel}_{package}")
    except ImportError as error:
        warnings.warn(f"{otherwise}, as {package} fails: {error}", stacklevel=3)
        return False
    return True


def describe_tensor(tensor: Tensor) -> str:
    """Shape and dtype for a sentence: `4x3 of float32`.

    Args:
        tensor: any.
    """
    return f"{'x'.join(map(str, tensor.shape)) or 'a scalar'} of {str(tensor.dtype).removeprefix('torch.')}"


__all__ = ["describe_tensor", "works"]
