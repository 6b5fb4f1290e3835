"""Some rows of a weight against some vectors, in vector instructions, as LLVM code inside of numba's.

LLVM makes good vectors of a loop that numba compiled, but such a loop has nowhere to ask the memory for what comes
next: asking beside it, for whole rows at once, is waiting for them. So the loops are emitted here, and each step of
them also asks for one line of every row, some steps ahead; and since nothing that is written is ever one of the
weights, LLVM need not make sure of it.

    dots(rows, vectors, half):  sum_n[r] = Σ_i w_r[i] x_n[i]           every sum lies in registers
    adds(rows, vectors, half):  y_n[i] += Σ_r a_n[r] w_r[i]            a row is read once for all of the vectors

A memory is read fastest in a few runs that go on side by side, each in its order. So whoever has many rows to read had
better take them from that many places: what is asked for behind the end of a row is then the one that comes next. Where
rows lie anywhere, `adds` is told which ones come next.

Weights are float32 or bfloat16, which is widened as it is read; all else is float32. A step takes a line of the cache
of each row, what is left of a row is taken number by number.

Dimension letters: R rows, N vectors, I numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from intaglio.kernels.llvm_emitter import LINE, Emitter, Value, features

AHEAD = 2048
"""Bytes of a row between what is multiplied and what is asked for."""

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def lanes() -> int:
    """Numbers of a vector."""
    return 16 if "avx512f" in features() else 8


def most_vectors() -> int:
    """Vectors that four rows are multiplied with at a time: as many as there are registers for sums."""
    return 4 if "avx512f" in features() else 2


class _Emitter(Emitter):
    """See the base.

    Args:
        builder: numba's.
        half: whether weights are bfloat16.
    """

    def __init__(self, builder: ir.IRBuilder, half: bool) -> None:
        super().__init__(builder)
        self.half = half

    def place(self, address: Value, count: int, of: Value = _F32) -> Value:
        """A pointer to a vector of numbers at an address."""
        return self.builder.inttoptr(address, ir.VectorType(of, count).as_pointer())

    def load(self, address: Value, count: int) -> Value:
        """Numbers of float32."""
        return self.builder.load(self.place(address, count), align=4)

    def weights(self, address: Value, count: int) -> Value:
        """Weights as float32."""
        if not self.half:
            return self.load(address, count)
        bits = self.builder.zext(
            self.builder.load(self.place(address, count, _I16), align=2), ir.VectorType(_I32, count)
        )
        by = ir.Constant(ir.VectorType(_I32, count), [16] * count)
        return self.builder.bitcast(self.builder.shl(bits, by), ir.VectorType(_F32, count))

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """a b + c, rounded once where the processor can."""
        count = a.type.count
        return self.call(f"llvm.fmuladd.v{count}f32", ir.VectorType(_F32, count), a, b, c)

    def spread(self, number: Value, count: int) -> Value:
        """A vector with the same number in each lane."""
        nothing = ir.Constant(ir.VectorType(_F32, count), ir.Undefined)
        one = self.builder.insert_element(nothing, number, _number(0, _I32))
        return self.builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(_I32, count), [0] * count))

    def sum(self, vector: Value) -> Value:
        """The sum of the lanes, by halves."""
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
        return self.builder.extract_element(vector, _number(0, _I32))


def _number(value: int, of: ir.IntType = _I64) -> ir.Constant:
    return ir.Constant(of, value)


def _loop(
    b: ir.IRBuilder, start: Value, end: Value, step: int, carried: Sequence[Value], body: Callable[..., Sequence[Value]]
) -> list[Value]:
    """Emit `for i in range(start, end, step): carried = body(i, carried)` and return what is carried at its end."""
    before, head, inside, behind = b.block, *(b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(_I64)
    i.add_incoming(start, before)
    phis = [b.phi(value.type) for value in carried]
    b.cbranch(b.icmp_signed("<", i, end), inside, behind)
    b.position_at_end(inside)
    found = body(i, phis)
    for phi, first, after in zip(phis, carried, found, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(after, b.block)
    i.add_incoming(b.add(i, _number(step)), b.block)
    b.branch(head)
    b.position_at_end(behind)
    return list(phis)


@lru_cache
def dots(rows: int, vectors: int, half: bool) -> Callable[..., None]:
    """Return a function for numba: inner products of rows with vectors.

        dots((I, sums, w_1 ... w_R, x_1 ... x_N))

    `sums` is the address of N times R float32, which are written; `w_r` are those of the rows, `x_n` those of the
    vectors. All are 64-bit integers.

    Args:
        rows: R.
        vectors: N.
        half: whether the rows are bfloat16, else float32.
    """

    def emit(b: ir.IRBuilder, I: Value, sums: Value, *given: Value) -> None:  # noqa: E741
        emit, size = _Emitter(b, half), 2 if half else 4
        row_R, x_N = given[:rows], given[rows:]
        total_NR = [[ir.Constant(_F32, 0.0)] * rows for _ in range(vectors)]
        for start, end, step, count in _steps(b, I, size):

            def body(i: Value, sum_: Sequence[Value], step: int = step, count: int = count) -> list[Value]:
                found = list(sum_)
                if count > 1:
                    for row in row_R:
                        emit.fetch(b.add(row, b.add(b.mul(i, _number(size)), _number(AHEAD))))
                for part in range(0, step, count):
                    at = b.add(i, _number(part))
                    w_R = [emit.weights(b.add(row, b.mul(at, _number(size))), count) for row in row_R]
                    for n, x in enumerate(x_N):
                        value = emit.load(b.add(x, b.mul(at, _number(4))), count)
                        for r, weight in enumerate(w_R):
                            found[n * rows + r] = emit.multiply_add(weight, value, found[n * rows + r])
                return found

            zero = ir.Constant(ir.VectorType(_F32, count), [0.0] * count)
            parts = _loop(b, start, end, step, [zero] * (rows * vectors), body)
            total_NR = [
                [b.fadd(total, emit.sum(parts[n * rows + r])) for r, total in enumerate(total_R)]
                for n, total_R in enumerate(total_NR)
            ]
        for n, total_R in enumerate(total_NR):
            for r, total in enumerate(total_R):
                there = b.add(sums, _number(4 * (n * rows + r)))
                b.store(total, b.inttoptr(there, _F32.as_pointer()), align=4)

    return _function(emit)


@lru_cache
def adds(rows: int, vectors: int, half: bool, onward: bool = False) -> Callable[..., None]:
    """Return a function for numba: rows, times a number each, added to vectors.

        adds((I, numbers, w_1 ... w_R, y_1 ... y_N))
        adds((I, numbers, w_1 ... w_R, next_1 ... next_R, y_1 ... y_N))      onward

    `numbers` is the address of N times R float32; `w_r` are those of the rows, `next_r` those of the rows that come
    next, `y_n` those of the vectors. All are 64-bit integers.

    Args:
        rows: R.
        vectors: N.
        half: whether the rows are bfloat16, else float32.
        onward: whether it is told which rows come next. Default: they lie behind these.
    """

    def emit(b: ir.IRBuilder, I: Value, numbers: Value, *given: Value) -> None:  # noqa: E741
        emit, size = _Emitter(b, half), 2 if half else 4
        row_R, next_R, y_N = given[:rows], given[rows : 2 * rows] if onward else None, given[-vectors:]
        number_NR = [
            [
                b.load(b.inttoptr(b.add(numbers, _number(4 * (n * rows + r))), _F32.as_pointer()), align=4)
                for r in range(rows)
            ]
            for n in range(vectors)
        ]

        def over(start: Value, end: Value, step: int, count: int, asked_R: Sequence[Value]) -> None:
            factor_NR = [[emit.spread(number, count) for number in number_R] for number_R in number_NR]

            def body(i: Value, _: Any) -> list[Value]:
                for asked in asked_R:
                    emit.fetch(b.add(asked, b.mul(i, _number(size))))
                for part in range(0, step, count):
                    at = b.add(i, _number(part))
                    w_R = [emit.weights(b.add(row, b.mul(at, _number(size))), count) for row in row_R]
                    for y, factor_R in zip(y_N, factor_NR, strict=True):
                        there = b.add(y, b.mul(at, _number(4)))
                        value = emit.load(there, count)
                        for weight, factor in zip(w_R, factor_R, strict=True):
                            value = emit.multiply_add(weight, factor, value)
                        b.store(value, emit.place(there, count), align=4)
                return []

            _loop(b, start, end, step, [], body)

        (start, whole, step, count), rest = _steps(b, I, size)
        own_R = [b.add(row, _number(AHEAD)) for row in row_R]
        if next_R is None:
            over(start, whole, step, count, own_R)
        else:
            # The last steps of a row ask for the first lines of the next.
            turn = b.sub(whole, _number(AHEAD // size))
            turn = b.select(b.icmp_signed(">", turn, start), turn, start)
            over(start, turn, step, count, own_R)
            over(turn, whole, step, count, [b.sub(row, b.mul(turn, _number(size))) for row in next_R])
        over(*rest, [])

    return _function(emit)


def _steps(b: ir.IRBuilder, I: Value, size: int) -> list[tuple[Value, Value, int, int]]:  # noqa: E741
    """`(start, end, numbers of a step, of a vector)` of the two loops over a row."""
    line = LINE // size
    whole = b.and_(I, _number(-line))
    return [(_number(0), whole, line, min(line, lanes())), (whole, I, 1, 1)]


def _function(emit: Callable[..., None]) -> Callable[..., None]:
    """As numba calls it: with a tuple of numbers."""

    @intrinsic
    def function(_context, given):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Value:
            emit(builder, *(builder.extract_value(values[0], place) for place in range(len(signature.args[0]))))
            return context.get_dummy_value()

        return types.void(given), generate

    return function


__all__ = ["AHEAD", "adds", "dots", "lanes", "most_vectors"]
