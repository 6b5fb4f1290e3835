"""Inner loop of the ternary product as LLVM vector code inside numba's.

numba compiles scalar loops, for which LLVM does not find the byte multiplication instructions: the product would run at
a fifth of the memory's speed. `tile` gives numba a function whose body is emitted here, vector by vector:

    load V bytes of four rows of weights        shift by 0, 2, 4, 6 and mask: the codes (weight + 1) of 4V columns a row
    for each of some tokens: load 4 V bytes     multiply with the codes and add four neighbours into 32-bit lanes

for V of the widest vectors of this processor, then of 16 bytes for the rest of the row. The multiplication is

- `vnni`: VPDPBUSD, which multiplies 64 pairs of bytes and adds them to 16 sums (AVX-512 VNNI);
- `avx2`: PMADDUBSW and PMADDWD; sums of 16 bits never saturate, as a code is at most 2: 4 (2 x 2 x 128) = 2048;
- `any`: shifts and 16-bit products, on any processor.

Weights are read once, so that one to three tokens are memory-bound, and every step prefetches weights of later steps.

Unsigned codes corrected by the sum of x are also the layout of llama.cpp's TQ2_0 (its pull request 8151).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from intaglio.kernels.llvm_emitter import Emitter as Base
from intaglio.kernels.llvm_emitter import Value, features

ROWS = 4
"""Rows of the weight that a tile multiplies together."""
_TAIL = 16
"""Bytes of the vectors for the rest of a row; rows are padded to it."""

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def instructions() -> tuple[str, int]:
    """Return this processor's byte multiplication and vector width in bytes, as numba will compile for it."""
    has = features()
    if {"avx512vnni", "avx512bw", "avx512vl"} <= has:
        return "vnni", 64
    return ("avx2", 32) if "avx2" in has else ("any", 32)


class Emitter(Base):
    """Emitter for the ternary product, for a kind of `instructions`."""

    def __init__(self, builder: ir.IRBuilder, kind: str) -> None:
        super().__init__(builder)
        self.kind = kind

    def load(self, address: Value, size: int) -> Value:
        """Load an unaligned vector of this many bytes."""
        pointer = self.builder.inttoptr(address, ir.VectorType(_I8, size).as_pointer())
        return self.builder.load(pointer, align=1)

    def codes(self, packed: Value, size: int) -> list[Value]:
        """Return the four vectors of codes in a vector of packed bytes, by 16-bit shifts (there are no byte shifts)."""
        halves = self.builder.bitcast(packed, ir.VectorType(_I16, size // 2))
        result = []
        for k in range(4):
            moved = self.builder.lshr(halves, _splat(_I16, size // 2, 2 * k)) if k else halves
            masked = self.builder.and_(moved, _splat(_I16, size // 2, 0x0303))
            result.append(self.builder.bitcast(masked, ir.VectorType(_I8, size)))
        return result

    def add_products(self, sums: Value, codes: list[Value], xs: list[Value], size: int) -> Value:
        """Add to sums[n] the products of lanes 4n to 4n + 3 of codes and x, over the four pairs of vectors."""
        return getattr(self, f"_{self.kind}")(sums, codes, xs, size)

    def _vnni(self, sums: Value, codes: list[Value], xs: list[Value], size: int) -> Value:
        lanes = ir.VectorType(_I32, size // 4)
        result = ir.Constant(lanes, None)  # a separate chain: iterations then wait for one addition only
        for code, x in zip(codes, xs, strict=True):
            pair = (self.builder.bitcast(value, lanes) for value in (code, x))
            result = self.call(f"llvm.x86.avx512.vpdpbusd.{8 * size}", lanes, result, *pair)
        return self.builder.add(sums, result)

    def _avx2(self, sums: Value, codes: list[Value], xs: list[Value], size: int) -> Value:
        bytes_, halves = {
            16: ("llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.sse2.pmadd.wd"),
            32: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
        }[size]
        pairs = None
        for code, x in zip(codes, xs, strict=True):
            result = self.call(bytes_, ir.VectorType(_I16, size // 2), code, x)
            pairs = result if pairs is None else self.builder.add(pairs, result)
        fours = self.call(halves, ir.VectorType(_I32, size // 4), pairs, _splat(_I16, size // 2, 1))
        return self.builder.add(sums, fours)

    def _any(self, sums: Value, codes: list[Value], xs: list[Value], size: int) -> Value:
        b, pairs = self.builder, None
        for code, x in zip(codes, xs, strict=True):
            lanes = ir.VectorType(_I16, size // 2)
            code, x = b.bitcast(code, lanes), b.bitcast(x, lanes)
            even = b.mul(b.and_(code, _splat(_I16, size // 2, 255)), _low(b, x, _I16, size // 2))
            odd = b.mul(b.lshr(code, _splat(_I16, size // 2, 8)), b.ashr(x, _splat(_I16, size // 2, 8)))
            result = b.add(even, odd)
            pairs = result if pairs is None else b.add(pairs, result)
        fours = b.bitcast(pairs, ir.VectorType(_I32, size // 4))
        fours = b.add(_low(b, fours, _I32, size // 4), b.ashr(fours, _splat(_I32, size // 4, 16)))
        return b.add(sums, fours)

    def folded(self, sums: Value, size: int) -> Value:
        """Add the lanes up to four."""
        lanes = size // 4
        while lanes > 4:
            lanes //= 2
            sums = self.builder.add(*(self.pick(sums, sums, range(lo, lo + lanes)) for lo in (0, lanes)))
        return sums

    def across(self, fours: list[Value]) -> Value:
        """Return a vector of the sums of four vectors of four lanes."""
        pairs = [
            self.builder.add(self.pick(one, other, (0, 4, 2, 6)), self.pick(one, other, (1, 5, 3, 7)))
            for one, other in (fours[:2], fours[2:])
        ]
        one, other = pairs
        return self.builder.add(self.pick(one, other, (0, 1, 4, 5)), self.pick(one, other, (2, 3, 6, 7)))

    def pick(self, one: Value, other: Value, lanes: Any) -> Value:
        """Shuffle the lanes of two vectors; the second's are numbered after the first's."""
        return self.builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))


def _splat(of: ir.IntType, lanes: int, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(of, lanes), [value] * lanes)


def _low(b: ir.IRBuilder, value: Value, of: ir.IntType, lanes: int) -> Value:
    """Return the lower half of each lane, sign-extended."""
    by = _splat(of, lanes, of.width // 2)
    return b.ashr(b.shl(value, by), by)


def tile(tokens: int, kind: str, size: int) -> Callable[..., None]:
    """Return a function for numba: the products of four rows of the weight with some tokens.

        tile(rows, b, c, d, ahead, J, x, sums, stride)

    `rows` is the address of the first row; b, c and d are the offsets of the other rows in rows, `ahead` the prefetch
    distance in bytes; J is the bytes of a row. `x` is the address of the first token's 4J integers, followed by the
    next token's; `sums` that of the first row's 32-bit result for the first token: those of the other rows are at the
    offsets b, c and d, those of the next token at `stride` bytes. All are 64-bit integers.
    """

    @intrinsic
    def multiply(_context, rows, b, c, d, ahead, J, x, sums, stride):
        return types.void(*(types.int64,) * 9), lambda context, builder, _signature, values: _emit(
            context, Emitter(builder, kind), tokens, size, *values
        )

    return multiply


def _emit(context: Any, emit: Emitter, tokens: int, widest: int, *arguments: Value) -> Value:
    rows, *offset_R, ahead, J, x, sums, stride = arguments
    b = emit.builder
    number = lambda value: ir.Constant(_I64, value)  # noqa: E731
    row_R = [rows, *(b.add(rows, b.mul(J, after)) for after in offset_R)]
    x_TK = [[b.add(x, b.mul(J, number(4 * token + k))) for k in range(4)] for token in range(tokens)]
    total_TR = [[ir.Constant(ir.VectorType(_I32, 4), None)] * ROWS for _ in range(tokens)]
    start: Value = number(0)
    for size in (widest, _TAIL):
        end = b.and_(J, number(-size))
        before, head, body, after = b.block, *(b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        j = b.phi(_I64)
        j.add_incoming(start, before)
        lanes = ir.VectorType(_I32, size // 4)
        sum_TR = [[b.phi(lanes) for _ in range(ROWS)] for _ in range(tokens)]
        b.cbranch(b.icmp_unsigned("<", j, end), body, after)

        b.position_at_end(body)
        for row in row_R:
            emit.fetch(b.add(b.add(row, j), ahead))
        code_RK = [emit.codes(emit.load(b.add(row, j), size), size) for row in row_R]
        for x_K, sum_R in zip(x_TK, sum_TR, strict=True):
            xs = [emit.load(b.add(plane, j), size) for plane in x_K]
            for codes, kept in zip(code_RK, sum_R, strict=True):
                kept.add_incoming(ir.Constant(lanes, None), before)
                kept.add_incoming(emit.add_products(kept, codes, xs, size), body)
        j.add_incoming(b.add(j, number(size)), body)
        b.branch(head)

        b.position_at_end(after)
        total_TR = [
            [b.add(total, emit.folded(result, size)) for total, result in zip(*both, strict=True)]
            for both in zip(total_TR, sum_TR, strict=True)
        ]
        start = end
    for token, total_R in enumerate(total_TR):
        address, four = b.add(sums, b.mul(stride, number(token))), emit.across(total_R)
        for r, after in enumerate([number(0), *offset_R]):
            pointer = b.inttoptr(b.add(address, b.mul(after, number(4))), _I32.as_pointer())
            b.store(b.extract_element(four, ir.Constant(_I32, r)), pointer, align=4)
    return context.get_dummy_value()
