"""Every fast path against stock on the machine at hand; exits with 1 if one is slower by more than 3 %.

    python benchmarks/guard.py                                    # products, decoding with SmolLM2, both
    python benchmarks/guard.py --parts products --threads 1,2
    ATEN_CPU_CAPABILITY=avx2 python benchmarks/guard.py           # the instructions of an older processor

A fast path is what a user gets by default, after its choices were measured (`intaglio.environment.tuning`). *Products*:
a linear layer in the verify loop for 1 to 16 tokens, gathered columns at 50 %, ternary weights, and an eighth of the
experts, each against the dense product of the same shape; layers alternate over copies that no cache holds. *Decoding*:
each training-free or bundled drafter, and R-Sparse at 50 %, against stock greedy `generate` on the same prompts.

Stock and fast path alternate, and the ratio is the median over the rounds of the ratio in a round, so that a slow phase
of the machine hits both; with one thread, times are the thread's CPU time. A path that was slower while stock itself
wandered by more than 10 % is measured again, up to three times; if it stays so, nothing is concluded (exit code 2).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import intaglio
from intaglio import atomic_io
from intaglio.checkpoint import Checkpoint
from intaglio.environment import tuning
from intaglio.errors import IntaglioError
from intaglio.kernels import sparse_experts, ternary
from intaglio.methods.activations.r_sparse import RSparse
from intaglio.methods.activations.r_sparse.layers import InputRule, SparseLinear
from intaglio.methods.decoding.aded import ADED
from intaglio.speculative import Speculative
from intaglio.speculative.drafters import PromptLookup, Undrafted
from intaglio.speculative.prepacked_linear import MIN_NEW_TOKENS, Prepacked, choices
from machine import WANDERED, machine, title, wandering

SLOWER = 0.03
"""Share of stock's time by which a fast path may be slower."""
BYTES = 64 << 20
"""Bytes of the copies of a weight that a product alternates over."""
SHAPES = ((576, 576), (576, 1536), (1536, 576))
TOKENS = (1, 4, 8, 16)
PROMPTS = (
    "Explain how a binary search works and when it is better than a linear one.",
    "Write a short story about a lighthouse keeper who learns to paint.",
    "import json\n\n\ndef read_config(path):",
)

ATTEMPTS = 3
TURN = 0.02
"""Seconds of a turn of stock, about."""

Call = Callable[[int], None]
"""Runs something so many times."""
Pair = tuple[Call, Call]
"""Stock and fast path."""


def linear_pairs(shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, Pair]]:
    """Yield the products of linear layers as the verify loop computes them."""
    for inputs, outputs in shapes:
        layers = [nn.Linear(inputs, outputs, bias=False) for _ in range(_copies(inputs, outputs))]
        for rows in TOKENS:
            x_BI = torch.randn(rows, inputs)
            context = Prepacked(nn.ModuleList(layers), choices(layers))
            yield f"linear {inputs}x{outputs}, {rows} tokens", (_through(layers, x_BI), _through(layers, x_BI, context))


def sparse_pairs(shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, Pair]]:
    """Yield decoding through thresholds that leave out half of the inputs, against the dense layers."""
    for inputs, outputs in shapes:
        layers = [nn.Linear(inputs, outputs, bias=False) for _ in range(_copies(inputs, outputs))]
        x_BI = torch.randn(1, inputs)
        limit = float(x_BI.abs().median())
        sparse = [SparseLinear.from_weight(layer.weight, None, InputRule(limit, None, False)) for layer in layers]
        yield f"gathered columns at 50 %, {inputs}x{outputs}", (_through(layers, x_BI), _through(sparse, x_BI))


def ternary_pairs(shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, Pair]]:
    """Yield products with ternary weights against those with the same weights in float32."""
    for inputs, outputs in shapes:
        codes_OI = torch.randint(-1, 2, (outputs, inputs), dtype=torch.int8)
        dense, packed = codes_OI.float(), ternary.pack(codes_OI)
        floats = cycle([dense.clone() for _ in range(_copies(inputs, outputs))])
        packs = cycle([packed.clone() for _ in range(16 * _copies(inputs, outputs))])
        for rows in TOKENS:
            x_BI = torch.randn(rows, inputs)

            stock = _repeated(partial(lambda x, turn: nn.functional.linear(x, next(turn)), x_BI, floats))
            fast = _repeated(partial(lambda x, turn: ternary.linear(x, next(turn), 1.7), x_BI, packs))
            yield f"ternary {inputs}x{outputs}, {rows} tokens", (stock, fast)


def expert_pairs() -> Iterator[tuple[str, Pair]]:
    """Yield feed-forwards of 32 experts of which each token takes four, against all experts."""
    width, experts, inner = 576, 32, 48
    weights = [tuple(torch.randn(experts * inner, width) for _ in range(2)) for _ in range(_copies(width, 2 * 1536))]
    for rows in TOKENS:
        x_TD, score_TE = torch.randn(rows, width), torch.zeros(rows, experts)
        score_TE.scatter_(1, torch.rand(rows, experts).topk(4).indices, 1.0)
        stock, fast = (
            _repeated(partial(lambda product, x, score, turn: product(x, *next(turn), score), *each, cycle(weights)))
            for each in ((sparse_experts.masked, x_TD, score_TE), (sparse_experts.apply, x_TD, score_TE))
        )
        yield f"experts, 4 of 32, {rows} tokens", (stock, fast)


def decoding_pairs(new: int) -> Iterator[tuple[str, Pair]]:
    """Yield generation with every drafter and with R-Sparse, on all prompts, against stock greedy `generate`."""
    checkpoint = intaglio.load("smollm2")
    decoders: dict[str, Callable[[], Any]] = {
        "no drafts": lambda: Speculative(Undrafted()),
        "prompt_lookup": lambda: Speculative(PromptLookup()),
        "aded": lambda: ADED(corpus="wikipedia", tokenizer=checkpoint.tokenizer),
        "chimera": lambda: checkpoint.decoder("chimera"),
        "hidden_transfer": lambda: checkpoint.decoder("hidden_transfer"),
    }
    stock = _generating(checkpoint, new)
    for name, make in decoders.items():
        yield f"generate, {name}", (stock, _generating(checkpoint, new, custom_generate=make()))
    sparse = Checkpoint(copy.deepcopy(checkpoint.model), checkpoint.tokenizer, checkpoint.source)
    RSparse(sparsity=0.5).apply(sparse, "wikipedia")
    yield "generate, R-Sparse 50 %", (stock, _generating(sparse, new))


def _generating(checkpoint: Any, new: int, **options: Any) -> Call:
    """Return the continuation of all prompts by exactly `new` tokens."""
    rows = [checkpoint.tokenizer(text, return_tensors="pt")["input_ids"] for text in PROMPTS]
    fixed = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}

    def once() -> None:
        for ids in rows:
            checkpoint.model.generate(ids, attention_mask=torch.ones_like(ids), **fixed, **options)

    return _repeated(once)


def _copies(inputs: int, outputs: int) -> int:
    return max(2, BYTES // (4 * inputs * outputs))


def _through(
    layers: Sequence[nn.Module], x_BI: torch.Tensor, context: AbstractContextManager[None] | None = None
) -> Call:
    """Return the product with the next of some layers, within a context."""
    turns = cycle(layers)

    def call(count: int) -> None:
        with context or nullcontext():
            for _ in range(count):
                next(turns)(x_BI)

    return call


def _repeated(once: Callable[[], Any]) -> Call:
    def call(count: int) -> None:
        for _ in range(count):
            once()

    return call


@torch.inference_mode()
def measure(pair: Pair, rounds: int, seconds: float) -> dict[str, Any]:
    """Alternate stock and fast path; return the median ratio of a round, and the seconds of both in order."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for call in pair[::-1]:
        start = clock()
        call(1)
        took = clock() - start
    if took < TURN:  # else a turn is one call, whatever the first one took
        start = clock()
        pair[0](1)
        took = clock() - start
    count = max(1, min(200, round(TURN / took)))
    times: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - began > seconds:
            break
        for place in (0, 1) if turn % 2 else (1, 0):
            start = clock()
            pair[place](count)
            times[place].append((clock() - start) / count)
    stock, fast = times
    return {"ratio": median(b / a for a, b in zip(stock, fast, strict=True)), "stock": stock, "fast": fast}


def judge(pair: Pair, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure a pair, again where it is slower while stock wandered; add `slower` and `wandered` to the result."""
    for _ in range(ATTEMPTS):
        result = measure(pair, rounds, seconds)
        result |= {"slower": result["ratio"] > 1 + SLOWER, "wandered": wandering(result["stock"])}
        if not result["slower"] or result["wandered"] <= WANDERED:
            break
    return result


def _line(result: dict[str, Any]) -> str:
    mark = f"  SLOWER, stock wandered by {result['wandered']:.0%}" if result["slower"] else ""
    return f"{result['name']:44} {1 / result['ratio']:6.2f} times stock{mark}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="products,decoding", help="comma-separated; default: %(default)s")
    parser.add_argument("--only", default="", help="parts of the names of the paths, comma-separated; default: all")
    parser.add_argument("--threads", default=str(torch.get_num_threads()), help="comma-separated; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=21, help="most rounds; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a comparison; default: %(default)s")
    parser.add_argument("--new", type=int, default=MIN_NEW_TOKENS, help="new tokens; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "out", help="output directory")
    given = parser.parse_args()
    parts = given.parts.split(",")
    if unknown := [part for part in parts if part not in ("products", "decoding")]:
        raise IntaglioError(f"--parts has {unknown[0]!r}; accepted: products, decoding")
    results: list[dict[str, Any]] = []
    for threads in map(int, given.threads.split(",")):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        print(title(), flush=True)
        # No limit of seconds: what is judged are the choices, not how many of them fit into the first run.
        with tuning.using(tuning.Tuner(tuning.default_path(), limit=math.inf)):
            for part in parts:
                for name, pair in _pairs(part, given.new):
                    if not any(some in name for some in given.only.split(",")):
                        continue
                    results.append({"name": name, "threads": threads, **judge(pair, given.rounds, given.seconds)})
                    print(_line(results[-1]), flush=True)
    atomic_io.write_json(given.out / "guard.json", {"machine": machine(), "results": results})
    late = [result for result in results if result["slower"]]
    certain = [result["name"] for result in late if result["wandered"] <= WANDERED]
    print(json.dumps({"paths": len(results), "slower": certain, "unclear": len(late) - len(certain)}))
    return 1 if certain else 2 if late else 0


def _pairs(part: str, new: int) -> Iterator[tuple[str, Pair]]:
    if part == "decoding":
        yield from decoding_pairs(new)
        return
    yield from linear_pairs([*SHAPES, (576, 49152)])
    yield from sparse_pairs(SHAPES)
    yield from ternary_pairs(SHAPES)
    yield from expert_pairs()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except IntaglioError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
