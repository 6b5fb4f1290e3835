"""LLVM vector code inside numba's: the shared base of the emitters."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import config
from numba.core.codegen import get_host_cpu_features

LINE = 64
"""Bytes of a cache line."""

Value = Any


def features() -> frozenset[str]:
    """Return the features of this processor, as numba will compile for it."""
    describe_tensor = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return frozenset(feature[1:] for feature in describe_tensor.split(",") if feature.startswith("+"))


class Emitter:
    """Operations at the end of a block of code of numba's builder."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def call(self, name: str, returned: Value, *values: Value) -> Value:
        """Call an LLVM function on these values."""
        module = self.builder.module
        made = ir.FunctionType(returned, [value.type for value in values])
        return self.builder.call(module.globals.get(name) or ir.Function(module, made, name), values)

    def fetch(self, address: Value) -> None:
        """Prefetch the cache line of an address into L2 (read, locality 2, data), without waiting."""
        pointer = self.builder.inttoptr(address, ir.IntType(8).as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, *(ir.Constant(ir.IntType(32), v) for v in (0, 2, 1)))


__all__ = ["LINE", "Emitter", "features"]
