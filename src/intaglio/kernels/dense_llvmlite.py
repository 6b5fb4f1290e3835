"""Products of a few rows of activations with a weight as torch stores it, on a CPU.

    y_NO = linear(x_NI, weight_OI, bias_O, threads)

A decoded token, or the tree of a verify pass, reads every weight once, so that such a product is bound by memory; the
libraries torch calls are made for many rows. Here four rows of the weight, from four places that are read side by side,
are multiplied with as many rows of activations at a time as registers hold (`row_dot_llvm`), and prefetched. Each
output is summed in one order, so results depend neither on the threads nor on the other rows.

The code is LLVM's own, without numba's front end, and compiled in a tenth of a second, once a process.

Dimension letters: N rows of activations, I inputs, O outputs.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import torch
from llvmlite import binding, ir
from torch import Tensor

from intaglio.kernels.llvm_emitter import Value
from intaglio.kernels.openmp import launch, most_threads
from intaglio.kernels.row_dot_llvm import constant, emit_dots, loop, most_vectors

MOST_ROWS = 16
"""Most rows of activations: more are better computed in blocks."""
DTYPES = (torch.float32, torch.bfloat16)
"""Of the weight; activations and sums are float32."""
_ROWS = 4
_LEAST = 64
"""Fewest outputs of a thread's share."""
_SHARES = 4
"""Shares for each thread, so that a thread that was interrupted delays the others little."""

_I64, _F32 = ir.IntType(64), ir.FloatType()
_FIELDS = ("weight", "outputs", "inputs", "x", "rows", "y", "share", "taken")


def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, threads: int) -> Tensor:
    """Return the product [N, O] in x's dtype; the weight is contiguous, in one of `DTYPES`."""
    (rows, inputs), outputs = x_NI.shape, len(weight_OI)
    x = x_NI.float().contiguous()
    y_NO = torch.empty(rows, outputs)
    threads = min(threads, most_threads())
    # Whole cache lines, which two threads should not share.
    share = max(_LEAST, -(-outputs // (threads * _SHARES if threads > 1 else 1)) + 15 & -16)
    values = (weight_OI.data_ptr(), outputs, inputs, x.data_ptr(), rows, y_NO.data_ptr(), share, 0)
    launch(_compiled(weight_OI.dtype == torch.bfloat16)[0], bytearray(struct.pack("8q", *values)), threads)
    if bias_O is not None:
        y_NO += bias_O
    return y_NO.to(x_NI.dtype)


@lru_cache
def _compiled(half: bool) -> tuple[int, Any]:
    """Return the address of the code for a weight dtype, and what keeps it."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64]), "product")
    _emit(ir.IRBuilder(function.append_basic_block()), function.args[0], half)
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
    )
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    return engine.get_function_address("product"), engine


def _emit(b: ir.IRBuilder, arguments: Value, half: bool) -> None:
    """Emit the function: take a share of the outputs until none is left, and compute it."""
    at = {name: b.inttoptr(b.add(arguments, constant(8 * n)), _I64.as_pointer()) for n, name in enumerate(_FIELDS)}
    value = {name: b.load(place) for name, place in at.items() if name != "taken"}
    again, inside, end = (b.append_basic_block() for _ in range(3))
    b.branch(again)
    b.position_at_end(again)
    first = b.mul(b.atomic_rmw("add", at["taken"], constant(1), "monotonic"), value["share"])
    b.cbranch(b.icmp_signed("<", first, value["outputs"]), inside, end)
    b.position_at_end(inside)
    left = b.sub(value["outputs"], first)
    _emit_share(b, value, half, first, b.select(b.icmp_signed("<", left, value["share"]), left, value["share"]))
    b.branch(again)
    b.position_at_end(end)
    b.ret_void()


def _emit_share(b: ir.IRBuilder, value: dict[str, Value], half: bool, first: Value, count: Value) -> None:
    """Emit the products for `count` outputs from `first` on; where four runs overlap, outputs are computed twice."""
    row = b.mul(value["inputs"], constant(2 if half else 4))
    run = b.lshr(b.add(count, constant(_ROWS - 1)), constant(2))
    latest = b.sub(count, run)
    starts = [b.mul(run, constant(r)) for r in range(_ROWS)]
    starts = [b.add(first, b.select(b.icmp_signed("<", start, latest), start, latest)) for start in starts]
    vector, line = b.mul(value["inputs"], constant(4)), b.mul(value["outputs"], constant(4))
    widths = [width for width in (4, 2, 1) if width <= most_vectors()]

    def group(g: Value, _: Any) -> list[Value]:
        output_R = [b.add(start, g) for start in starts]
        row_R = [b.add(value["weight"], b.mul(row, output)) for output in output_R]
        done: Value = constant(0)
        for width in widths:
            end = b.and_(value["rows"], constant(-width))

            def some(n: Value, _: Any, width: int = width) -> list[Value]:
                x_N = [b.add(value["x"], b.mul(vector, b.add(n, constant(k)))) for k in range(width)]
                total_NR = emit_dots(b, half, value["inputs"], row_R, x_N)
                for k, total_R in enumerate(total_NR):
                    target = b.add(value["y"], b.mul(line, b.add(n, constant(k))))
                    for output, total in zip(output_R, total_R, strict=True):
                        place = b.add(target, b.mul(output, constant(4)))
                        b.store(total, b.inttoptr(place, _F32.as_pointer()), align=4)
                return []

            loop(b, done, end, width, [], some)
            done = end
        return []

    loop(b, constant(0), run, 1, [], group)


__all__ = ["DTYPES", "MOST_ROWS", "linear"]
