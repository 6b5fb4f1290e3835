"""Vector instructions as LLVM code inside of numba's: what those who emit some share."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import config
from numba.core.codegen import get_host_cpu_features

LINE = 64
"""Bytes of a line of the cache."""

Value = Any


def features() -> frozenset[str]:
    """What this processor can, as numba will compile for it."""
    told = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return frozenset(feature[1:] for feature in told.split(",") if feature.startswith("+"))


class Emitter:
    """Operations at the end of a block of code.

    Args:
        builder: numba's.
    """

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def call(self, name: str, returned: Value, *values: Value) -> Value:
        """What a function of LLVM's returns for these values."""
        module = self.builder.module
        made = ir.FunctionType(returned, [value.type for value in values])
        return self.builder.call(module.globals.get(name) or ir.Function(module, made, name), values)

    def fetch(self, address: Value) -> None:
        """Ask for the line of this address, into the second-level cache (read, locality 2, data); nothing waits."""
        pointer = self.builder.inttoptr(address, ir.IntType(8).as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, *(ir.Constant(ir.IntType(32), v) for v in (0, 2, 1)))


__all__ = ["LINE", "Emitter", "features"]
