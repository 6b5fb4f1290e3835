"""LLVM vector code, inside numba's or alone: the shared base of the emitters. Importing it does not import numba."""

from __future__ import annotations

import os
from typing import Any

from llvmlite import binding, ir

LINE = 64
"""Bytes of a cache line."""

Value = Any


def features() -> frozenset[str]:
    """Return the features of this processor that numba compiles for."""
    names = os.environ.get("NUMBA_CPU_FEATURES") or binding.get_host_cpu_features().flatten()
    usable = frozenset(name[1:] for name in names.split(",") if name.startswith("+"))
    without_avx = os.environ.get("NUMBA_ENABLE_AVX") == "0"
    return frozenset(name for name in usable if not (without_avx and name.startswith("avx")))


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
