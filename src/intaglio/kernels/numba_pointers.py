"""Tensors by address in code that numba compiles: a tenth of what numba takes to look at an array."""

from __future__ import annotations

from functools import lru_cache

import numba
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

compiled = njit(nogil=True, error_model="numpy")
"""How functions of these kernels are compiled."""


@intrinsic
def pointer(_context, address, of):
    """An address as a pointer to numbers of this type."""

    def emit(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(of.dtype)(types.int64, of), emit


@intrinsic
def as_float(_context, bits):
    """The float32 of these bits."""
    return types.float32(types.int32), lambda _c, builder, _s, values: builder.bitcast(values[0], ir.FloatType())


@lru_cache(maxsize=1)
def may_share() -> bool:
    """Whether threads may be used at all: numba's own pool, its last choice, ends the process if two launches meet."""
    numba.get_num_threads()  # makes numba choose
    return numba.threading_layer() != "workqueue"
