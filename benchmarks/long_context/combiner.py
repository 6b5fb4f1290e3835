"""Time and memory of Combiner's attention against SDPA: how both grow with the length, and generation beside it.

    python benchmarks/long_context/combiner.py
    python benchmarks/long_context/combiner.py --lengths 2048,4096 --repeats 3 --variants fixed,logn
    python benchmarks/long_context/combiner.py --clock cpu --threads 1       # on a machine that others use

One attention call on random queries, keys and values (no projections), float32, causal, segments of √L rounded up to a
power of two. The exponent p is the slope of log time, or of log memory, over log L. Memory is counted exactly: the
largest sum of all live buffers that the call allocated, outputs included, inputs not. SDPA never stores its scores, so
its memory is linear; `dense scores` is softmax attention that does. A step is one token after L in the cache.

Arms alternate in one process; the first round is not counted. Writes `combiner.json` and `combiner.md`, and nothing if
the time of SDPA at a fixed length wandered by more than 10 % during the run.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from intaglio import atomic_io
from intaglio.methods.attention.combiner.grid import Tokens
from intaglio.methods.attention.combiner.layers import CombinerAttention, LayerConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from machine import check_quiet, machine, title

HERE = Path(__file__).resolve().parent
VARIANTS = ("fixed", "logn", "row_major", "mixture")
PROMISED = {"fixed": "1.5", "logn": "1, times log L", "row_major": "1.5", "mixture": "1.5", "sdpa": "2"}
LONGEST_DENSE = 4096
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
REFERENCE = 4096
"""Tokens of the SDPA call that is timed in every round, to see whether the machine is quiet."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of Combiner's attention by length, against SDPA.")
    parser.add_argument("--lengths", default="2048,4096,8192,16384")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="wall time or the process's CPU time")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    return parser.parse_args()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of buffers that are alive, of those allocated inside the context, and their peak."""

    def __init__(self, known: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = {x.untyped_storage().data_ptr() for x in known}

    def _free(self, pointer: int, size: int) -> None:
        self._seen.discard(pointer)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self._seen:
                storage = x.untyped_storage()
                self._seen.add(storage.data_ptr())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.data_ptr(), storage.nbytes())
        return result


def inputs(length: int, arguments: argparse.Namespace) -> Tokens:
    """Return random tokens; queries are scaled."""
    generator = torch.Generator().manual_seed(length)
    shape = (1, arguments.heads, length, arguments.head_size)
    query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
    hidden = torch.randn(1, length, arguments.heads * arguments.head_size, generator=generator)
    query = query * arguments.head_size**-0.5
    return Tokens(query, key, value, hidden, query, key, torch.ones(1, length, dtype=torch.bool))


def segment(length: int) -> int:
    """Return √L, rounded up to a power of two."""
    return 1 << math.ceil(math.log2(length) / 2)


def function(variant: str, length: int, arguments: argparse.Namespace) -> CombinerAttention:
    """Return the attention function of a variant; its keys of row summaries are averaged, not learned."""
    width = arguments.heads * arguments.head_size
    columns = 0 if variant == "logn" else segment(length)
    fields = ("identity", "max", "wsum", False)
    return CombinerAttention(LayerConfig(variant, columns, *fields, arguments.head_size, (width,) * 3))  # type: ignore[arg-type]


def dense(x: Tokens) -> Tensor:
    """Return causal softmax attention that stores all scores."""
    length = x.query.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (x.query @ x.key.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ x.value


def calls(length: int, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return the whole-sequence call of every arm."""
    x = inputs(length, arguments)
    arms: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(x.query, x.key, x.value, is_causal=True, scale=1.0)
    }
    for variant in arguments.variants.split(","):
        form = function(variant, length, arguments).form
        arms[variant] = lambda form=form: form.parallel(x)  # type: ignore[misc]
    return arms


def step_seconds(length: int, arguments: argparse.Namespace, count: int = 64) -> dict[str, float]:
    """Return the median seconds of a token after `length` tokens, of `count` tokens in a row."""
    x, new, now = inputs(length, arguments), inputs(count, arguments), CLOCKS[arguments.clock]
    seconds = {"sdpa": []} | {variant: [] for variant in arguments.variants.split(",")}
    keys, values = (F.pad(known, (0, 0, 0, count)) for known in (x.key, x.value))  # preallocated
    states = {}
    for variant in arguments.variants.split(","):
        attention = function(variant, length, arguments)
        states[variant] = (attention, attention.form.parallel(x, keep=True)[1])
    for place in range(count):
        own = slice(place, place + 1)
        query, key, value = (known[:, :, own] for known in (new.query, new.key, new.value))
        token = Tokens(query, key, value, new.hidden[:, own], query, key, new.real[:, :1])  # type: ignore[index]
        start = now()
        keys[:, :, length + place], values[:, :, length + place] = key[:, :, 0], value[:, :, 0]
        end = length + place + 1
        F.scaled_dot_product_attention(query, keys[:, :, :end], values[:, :, :end], scale=1.0)
        seconds["sdpa"].append(now() - start)
        for variant, (attention, state) in states.items():
            start = now()
            attention.form.step(token, state, attention.activate)  # type: ignore[arg-type]
            seconds[variant].append(now() - start)
    # The mean: a finished segment or block is paid for by one token of many.
    return {name: sum(took[1:]) / (len(took) - 1) for name, took in seconds.items()}


def memory(call: Callable[[], Any], length: int, arguments: argparse.Namespace) -> int:
    """Return the peak of the bytes that a call allocates."""
    x = inputs(length, arguments)
    gc.collect()
    with LiveBytes((x.query, x.key, x.value)) as counter:
        call()
    return counter.peak


def exponent(lengths: list[int], values: list[float]) -> float:
    """Return the least-squares slope of log value over log length."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return seconds, bytes and exponents of every arm."""
    lengths = [int(length) for length in arguments.lengths.split(",")]
    names = ["sdpa", *arguments.variants.split(",")]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[float]] = {name: [] for name in (*names, "dense scores")}
    steps: dict[str, list[float]] = {name: [] for name in names}
    reference, drift, now = calls(REFERENCE, arguments)["sdpa"], [], CLOCKS[arguments.clock]
    for length in lengths:
        arms = calls(length, arguments)
        took: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(-1, arguments.repeats):
            for place in range(len(names)):
                name = names[(place + repeat) % len(names)]
                start = now()
                arms[name]()
                if repeat >= 0:
                    took[name].append(now() - start)
            start = now()
            reference()
            drift.append(now() - start)
        for name in names:
            seconds[name].append(median(took[name]))
            peaks[name].append(memory(arms[name], length, arguments))
        for name, value in step_seconds(length, arguments).items():
            steps[name].append(value)
        if length <= LONGEST_DENSE:
            x = inputs(length, arguments)
            peaks["dense scores"].append(memory(lambda x=x: dense(x), length, arguments))  # type: ignore[misc]
        print(f"{length} tokens measured", file=sys.stderr)
    check_quiet(drift[1:], "SDPA")
    fits = {
        kind: {name: exponent(lengths[: len(row)], row) for name, row in rows.items() if len(row) > 1}
        for kind, rows in (("seconds", seconds), ("bytes", peaks))
    }
    settings = {name: getattr(arguments, name) for name in ("heads", "head_size", "repeats", "threads", "clock")}
    return {
        "machine": machine(), "settings": settings, "lengths": lengths, "seconds": seconds, "bytes": peaks,
        "step_seconds": steps, "exponents": fits,
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lengths = results["lengths"]
    lines = [title(), ""]
    for kind, unit, factor in (("seconds", "ms", 1e3), ("bytes", "MiB", 2.0**-20), ("step_seconds", "ms a token", 1e3)):
        fits = results["exponents"].get(kind, {})
        heading = [unit, *(f"{length:,}" for length in lengths), *(("exponent", "promised") if fits else ())]
        lines += ["| " + " | ".join(heading) + " |", "| --- " * len(heading) + "|"]
        for name, row in results[kind].items():
            cells = [
                name,
                *(f"{float(f'{factor * value:.3g}'):,g}" for value in row),
                *["-"] * (len(lengths) - len(row)),
            ]
            cells += [f"{fits[name]:.2f}" if name in fits else "-", PROMISED.get(name, "2")] if fits else []
            if kind == "bytes" and name == "sdpa":
                cells[-1] = "1"
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write both files."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        results = measure(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    atomic_io.write_json(arguments.out / "combiner.json", results)
    (arguments.out / "combiner.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
