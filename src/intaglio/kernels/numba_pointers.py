"""Raw pointers of tensors in numba code: a tenth of numba's overhead for arrays."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

compiled = njit(nogil=True, error_model="numpy")
"""Compilation options of the kernels."""


@intrinsic
def pointer(_context, address, of):
    """Return an address as a pointer to numbers of this type."""

    def emit(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(of.dtype)(types.int64, of), emit


@intrinsic
def as_float(_context, bits):
    """Return the float32 with these bits."""
    return types.float32(types.int32), lambda _c, builder, _s, values: builder.bitcast(values[0], ir.FloatType())


@intrinsic
def take(_context, address):
    """Return the counter at an address and add one to it, as a single step for all threads."""

    def emit(_context, builder, _signature, values):
        counter = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), emit


def shared(compute, shares, taken):
    """Return a C function for `openmp.launch`, which calls `compute(arguments, share)` until no share is left.

    Args:
        compute: compiled; computes a share, counted from 0.
        shares: place in the arguments, in eights of bytes, of the number of shares.
        taken: place of the counter.
    """

    @cfunc(types.void(types.int64))
    def entry(arguments):
        share = take(arguments + 8 * taken)
        while share < pointer(arguments, np.int64)[shares]:
            compute(arguments, share)
            share = take(arguments + 8 * taken)

    return entry
