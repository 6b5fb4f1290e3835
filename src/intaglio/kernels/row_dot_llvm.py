"""Dot and axpy of some weight rows with some vectors, as LLVM vector code inside numba's.

LLVM vectorises numba loops well, but they have no place for fine-grained prefetching, and prefetching whole rows ahead
stalls. So the loops are emitted here, and each step also prefetches a cache line of every row, some steps ahead; and
since outputs never alias weights, LLVM need not check.

    dots(rows, vectors, half):  sum_n[r] = Σ_i w_r[i] x_n[i]           sums stay in registers
    adds(rows, vectors, half):  y_n[i] += Σ_r a_n[r] w_r[i]            a row is read once for all vectors

Memory is read fastest in a few sequential streams. Callers with many rows should take them from that many places: the
prefetch beyond the end of a row then hits the next row. Where rows are scattered, `adds` is given the next ones.

Weights are float32 or bfloat16, widened when read; all else is float32. A step takes a cache line of each row; the rest
of a row is processed number by number.

Dimension letters: R rows, N vectors, I numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from llvmlite import ir

from intaglio.kernels.llvm_emitter import LINE, Emitter, Value, features

AHEAD = 2048
"""Prefetch distance in bytes."""

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def lanes() -> int:
    """Return the numbers of a vector."""
    return 16 if "avx512f" in features() else 8


def most_vectors() -> int:
    """Return the number of vectors that four rows can be multiplied with at a time, limited by registers."""
    return 4 if "avx512f" in features() else 2


class _Emitter(Emitter):
    """Emitter for rows; `half` means that weights are bfloat16."""

    def __init__(self, builder: ir.IRBuilder, half: bool) -> None:
        super().__init__(builder)
        self.half = half

    def place(self, address: Value, count: int, of: Value = _F32) -> Value:
        """Return a pointer to a vector at an address."""
        return self.builder.inttoptr(address, ir.VectorType(of, count).as_pointer())

    def load(self, address: Value, count: int) -> Value:
        """Load float32 numbers."""
        return self.builder.load(self.place(address, count), align=4)

    def weights(self, address: Value, count: int) -> Value:
        """Load weights as float32."""
        if not self.half:
            return self.load(address, count)
        bits = self.builder.zext(
            self.builder.load(self.place(address, count, _I16), align=2), ir.VectorType(_I32, count)
        )
        by = ir.Constant(ir.VectorType(_I32, count), [16] * count)
        return self.builder.bitcast(self.builder.shl(bits, by), ir.VectorType(_F32, count))

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """Return a b + c, fused where the processor can."""
        count = a.type.count
        return self.call(f"llvm.fmuladd.v{count}f32", ir.VectorType(_F32, count), a, b, c)

    def spread(self, number: Value, count: int) -> Value:
        """Broadcast a number to a vector."""
        nothing = ir.Constant(ir.VectorType(_F32, count), ir.Undefined)
        one = self.builder.insert_element(nothing, number, constant(0, _I32))
        return self.builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(_I32, count), [0] * count))

    def sum(self, vector: Value) -> Value:
        """Return the sum of the lanes, by halves."""
        count = vector.type.count
        while count > 1:
            count //= 2
            low, high = (
                self.builder.shuffle_vector(
                    vector, vector, ir.Constant(ir.VectorType(_I32, count), list(range(start, start + count)))
                )
                for start in (0, count)
            )
            vector = self.builder.fadd(low, high)
        return self.builder.extract_element(vector, constant(0, _I32))


def constant(value: int, of: ir.IntType = _I64) -> ir.Constant:
    """Return a constant, of 64 bits by default."""
    return ir.Constant(of, value)


def loop(
    b: ir.IRBuilder, start: Value, end: Value, step: int, carried: Sequence[Value], body: Callable[..., Sequence[Value]]
) -> list[Value]:
    """Emit `for i in range(start, end, step): carried = body(i, carried)` and return the final `carried`."""
    before, head, inside, after_block = b.block, *(b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(_I64)
    i.add_incoming(start, before)
    phis = [b.phi(value.type) for value in carried]
    b.cbranch(b.icmp_signed("<", i, end), inside, after_block)
    b.position_at_end(inside)
    results = body(i, phis)
    for phi, first, after in zip(phis, carried, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(after, b.block)
    i.add_incoming(b.add(i, constant(step)), b.block)
    b.branch(head)
    b.position_at_end(after_block)
    return list(phis)


@lru_cache
def dots(rows: int, vectors: int, half: bool) -> Callable[..., None]:
    """Return a function for numba: inner products of rows with vectors.

        dots((I, sums, w_1 ... w_R, x_1 ... x_N))

    `sums` is the address of the N times R float32 outputs; `w_r` and `x_n` those of rows and vectors. All are 64-bit
    integers.
    """

    def emit(b: ir.IRBuilder, I: Value, sums: Value, *arguments: Value) -> None:  # noqa: E741
        total_NR = emit_dots(b, half, I, arguments[:rows], arguments[rows:])
        for place, total in enumerate(total for total_R in total_NR for total in total_R):
            b.store(total, b.inttoptr(b.add(sums, constant(4 * place)), _F32.as_pointer()), align=4)

    return _function(emit)


def emit_dots(
    b: ir.IRBuilder,
    half: bool,
    I: Value,  # noqa: E741
    row_R: Sequence[Value],
    x_N: Sequence[Value],
) -> list[list[Value]]:
    """Emit the inner products [N][R] of rows with vectors; rows are prefetched."""
    emit, size, rows = _Emitter(b, half), 2 if half else 4, len(row_R)
    total_NR = [[ir.Constant(_F32, 0.0)] * rows for _ in x_N]
    for start, end, step, count in _steps(b, I, size):

        def body(i: Value, sum_: Sequence[Value], step: int = step, count: int = count) -> list[Value]:
            sums = list(sum_)
            if count > 1:
                for row in row_R:
                    emit.fetch(b.add(row, b.add(b.mul(i, constant(size)), constant(AHEAD))))
            for part in range(0, step, count):
                at = b.add(i, constant(part))
                w_R = [emit.weights(b.add(row, b.mul(at, constant(size))), count) for row in row_R]
                for n, x in enumerate(x_N):
                    value = emit.load(b.add(x, b.mul(at, constant(4))), count)
                    for r, weight in enumerate(w_R):
                        sums[n * rows + r] = emit.multiply_add(weight, value, sums[n * rows + r])
            return sums

        zero = ir.Constant(ir.VectorType(_F32, count), [0.0] * count)
        parts = loop(b, start, end, step, [zero] * (rows * len(x_N)), body)
        total_NR = [
            [b.fadd(total, emit.sum(parts[n * rows + r])) for r, total in enumerate(total_R)]
            for n, total_R in enumerate(total_NR)
        ]
    return total_NR


@lru_cache
def adds(rows: int, vectors: int, half: bool, onward: bool = False) -> Callable[..., None]:
    """Return a function for numba: scaled rows added to vectors.

        adds((I, numbers, w_1 ... w_R, y_1 ... y_N))
        adds((I, numbers, w_1 ... w_R, next_1 ... next_R, y_1 ... y_N))      onward

    `numbers` is the address of N times R float32 factors; `w_r`, `next_r` (the rows to prefetch) and `y_n` those of
    rows and vectors. All are 64-bit integers.
    """

    def emit(b: ir.IRBuilder, I: Value, numbers: Value, *arguments: Value) -> None:  # noqa: E741
        emit, size = _Emitter(b, half), 2 if half else 4
        row_R, next_R, y_N = arguments[:rows], arguments[rows : 2 * rows] if onward else None, arguments[-vectors:]
        number_NR = [
            [
                b.load(b.inttoptr(b.add(numbers, constant(4 * (n * rows + r))), _F32.as_pointer()), align=4)
                for r in range(rows)
            ]
            for n in range(vectors)
        ]

        def over(start: Value, end: Value, step: int, count: int, prefetch_R: Sequence[Value]) -> None:
            factor_NR = [[emit.spread(number, count) for number in number_R] for number_R in number_NR]

            def body(i: Value, _: Any) -> list[Value]:
                for address in prefetch_R:
                    emit.fetch(b.add(address, b.mul(i, constant(size))))
                for part in range(0, step, count):
                    at = b.add(i, constant(part))
                    w_R = [emit.weights(b.add(row, b.mul(at, constant(size))), count) for row in row_R]
                    for y, factor_R in zip(y_N, factor_NR, strict=True):
                        target = b.add(y, b.mul(at, constant(4)))
                        value = emit.load(target, count)
                        for weight, factor in zip(w_R, factor_R, strict=True):
                            value = emit.multiply_add(weight, factor, value)
                        b.store(value, emit.place(target, count), align=4)
                return []

            loop(b, start, end, step, [], body)

        (start, full, step, count), rest = _steps(b, I, size)
        own_R = [b.add(row, constant(AHEAD)) for row in row_R]
        if next_R is None:
            over(start, full, step, count, own_R)
        else:
            # The last steps of a row prefetch the first lines of the next.
            turn = b.sub(full, constant(AHEAD // size))
            turn = b.select(b.icmp_signed(">", turn, start), turn, start)
            over(start, turn, step, count, own_R)
            over(turn, full, step, count, [b.sub(row, b.mul(turn, constant(size))) for row in next_R])
        over(*rest, [])

    return _function(emit)


def _steps(b: ir.IRBuilder, I: Value, size: int) -> list[tuple[Value, Value, int, int]]:  # noqa: E741
    """Return `(start, end, numbers per step, per vector)` of the two loops over a row."""
    line = LINE // size
    full = b.and_(I, constant(-line))
    return [(constant(0), full, line, min(line, lanes())), (full, I, 1, 1)]


def _function(emit: Callable[..., None]) -> Callable[..., None]:
    """Wrap an emitter as numba calls it, with a tuple of numbers."""
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def function(_context, arguments):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Value:
            emit(builder, *(builder.extract_value(values[0], place) for place in range(len(signature.args[0]))))
            return context.get_dummy_value()

        return types.void(arguments), generate

    return function


__all__ = ["AHEAD", "adds", "constant", "dots", "emit_dots", "lanes", "loop", "most_vectors"]
